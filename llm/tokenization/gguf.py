"""The tokenizer inside a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llm.errors import InputError
from llm.tokenization.backends import Backend, HuggingFace, SentencePiece

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_ROLES = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id",
    "sep": "seperator_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre: a pattern that splits text; None for what GPT-2 does, "digits" for that after every digit stands alone.
_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LETTERS + r"\p{N}{1,3}" + _REST),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _LETTERS + r"\p{N}" + _REST),
}
# Of these a word that is in the vocabulary is one token, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")


def read(file: pathlib.Path) -> tuple[Backend, dict[str, str], str | None]:
    """The backend, the roles of special tokens and the chat template of a GGUF file.

    Like llama.cpp and unlike the tokenizer.json that such a file is often made from, no Unicode normalization is done.

    Raises:
        InputError: it holds no tokenizer, or one of another kind.
    """
    import gguf  # 1 MB, for such files only

    try:
        fields = gguf.GGUFReader(file).fields
    except (ValueError, IndexError) as error:
        raise InputError(f"{file} is not a whole GGUF file: {error}") from None
    values = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    kind = values.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in values:
        raise InputError(f"{file} holds no tokenizer")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{file}: tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' can be read")
    tokens = values["tokenizer.ggml.tokens"]
    types = values.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    backend = _merges(file, tokens, types, values) if kind == "gpt2" else _scores(file, tokens, types, values)
    roles = {
        role: tokens[i] for role, name in _ROLES.items() if (i := values.get(f"tokenizer.ggml.{name}")) is not None
    }
    known = backend.pieces().special
    backend = backend.with_special([token for token in dict.fromkeys(roles.values()) if token not in known])
    return backend, roles, values.get("tokenizer.chat_template")


def _merges(file: pathlib.Path, tokens: list[str], types: list[int], values: dict) -> Backend:
    """Byte-level BPE."""
    name = values.get("tokenizer.ggml.pre", "")
    if name not in _SPLITS:
        raise InputError(
            f"{file}: how tokenizer.ggml.pre={name!r} splits text is not known here; there are {', '.join(_SPLITS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_WORDS)
    library = tokenizers.Tokenizer(model)
    pattern = _SPLITS[name]
    steps = [] if pattern is None else [
        pre_tokenizers.Split(Regex(r"\p{N}" if pattern == "digits" else pattern), "isolated")
    ]  # fmt: skip
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    library.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])
    library.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types):
        if kind in (_CONTROL, _USER_DEFINED):
            library.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return HuggingFace(library)


def _scores(file: pathlib.Path, tokens: list[str], types: list[int], values: dict) -> Backend:
    """BPE by the scores of pieces: the SentencePiece model that the file was made from, put together again."""
    from sentencepiece import sentencepiece_model_pb2

    if types.count(_UNKNOWN) != 1:
        raise InputError(
            f"{file}: {types.count(_UNKNOWN)} tokens of tokenizer.ggml.token_type 2, the unknown; must be one"
        )
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, values["tokenizer.ggml.scores"], types):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = types.index(_UNKNOWN)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePiece(model.SerializeToString())
