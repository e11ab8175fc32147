"""The tokenizer inside a GGUF file: its tokens, merges, special ids and chat template."""

import pathlib
from typing import Any

from llm.errors import InputError
from llm.tokenization.backends import BYTE, CONTROL, NORMAL, UNKNOWN, new_proto
from llm.tokenization.byte_pairs import gguf_bpe
from llm.tokenization.loading import sentencepiece_document
from llm.tokenization.pieces import SPACE
from llm.tokenization.tokenizer import META

# Where a file names a role's id. Its end of sequence is the end of text.
_ROLES = {"end_of_text": "eos", "bos": "bos", "pad": "padding", "unk": "unknown", "cls": "cls", "sep": "seperator",
          "mask": "mask"}  # fmt: skip


def read(path: pathlib.Path) -> dict[str, Any]:
    """The tokenizer.json of a GGUF.

    `tokenizer.ggml.model` "gpt2" is byte-level BPE; "llama" is SentencePiece's BPE, of which a model is made.

    Raises:
        InputError: no GGUF, none with a tokenizer, or another kind of it.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InputError(f"{path} is no GGUF file: {error}") from None

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    kind, tokens = field("ggml.model"), field("ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        found = f"a tokenizer of the kind {kind!r}" if kind else "no tokenizer"
        raise InputError(f"{path}: it holds {found}; 'gpt2' and 'llama' can be read")
    types = field("ggml.token_type", [NORMAL] * len(tokens))
    roles = {}
    for role, name in _ROLES.items():
        i = field(f"ggml.{name}_token_id")
        if i is not None and 0 <= i < len(tokens):
            roles[role] = tokens[i]
    meta: dict[str, Any] = {"roles": roles}
    template = field("chat_template")
    if template:
        meta["chat_template"] = template
    if kind == "gpt2":
        pre = field("ggml.pre", "gpt-2")
        made = gguf_bpe(tokens, types, field("ggml.merges", []), "gpt-2" if pre == "default" else pre, str(path))
        made["model"][META] = meta
        return made
    scores = field("ggml.scores")
    if scores is None:
        raise InputError(f"{path}: its tokens have no scores (tokenizer.ggml.scores)")
    data = _proto(tokens, scores, types, field("ggml.add_space_prefix", True), field("ggml.unknown_token_id", 0))
    made = sentencepiece_document(data, **{k: v for k, v in meta.items() if k != "roles"})
    made["model"][META]["roles"] = {**made["model"][META]["roles"], **roles}
    return made


def _proto(tokens: list[str], scores: list[float], types: list[int], add_space: bool, unk: int) -> bytes:
    """The SentencePiece model of a "llama" vocabulary: merges by score, unknown characters as bytes."""
    model = new_proto()
    for i, (token, score, type_) in enumerate(zip(tokens, scores, types)):
        # The library refuses a model with two unknown pieces, and one without.
        if type_ == UNKNOWN and i != unk:
            type_ = CONTROL
        model.pieces.add(piece=token.replace(" ", SPACE), score=score, type=UNKNOWN if i == unk else type_)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, len(tokens), BYTE in types
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unk, -1, -1, -1
    trainer.unk_piece = tokens[unk]
    normalizer.name, normalizer.add_dummy_prefix = "identity", bool(add_space)
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()
