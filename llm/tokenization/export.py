"""Writing tokenizers for Hugging Face's transformers, those of SentencePiece among them.

A SentencePiece model becomes a tokenizer.json of its pieces and settings; it stays in the file as well, and this
project goes by that. Text gets the ids of sentencepiece, but for three things that the format has no place for: in
text, the name of a special token is the token, and that of a byte, <0x41>, the byte; and where a BPE's piece can be
made in two ways that overlap, the other one may be taken.
"""

import base64
import json
import pathlib
from typing import Any

from llm.errors import InputError
from llm.tokenization.backends import CONTROL, MARIAN, NORMAL, SENTENCEPIECE, UNKNOWN, USER_DEFINED, read_proto
from llm.tokenization.pieces import SPACE

META = "llm"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto


def write(document: dict[str, Any], folder: pathlib.Path) -> str:
    """Writes the files of a tokenizer, given as our tokenizer.json; the name of their class for it.

    Raises:
        InputError: a SentencePiece model of whole words or characters, which the format has no place for.
    """
    meta = document["model"].get(META) or {}
    if MARIAN in meta:
        for name, data in meta[MARIAN].items():
            (folder / f"{name}.spm").write_bytes(base64.b64decode(data))
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        vocab = json.dumps({**document["model"]["vocab"], **added}, ensure_ascii=False)
        (folder / "vocab.json").write_text(vocab, encoding="utf-8")
        return "MarianTokenizer"
    if SENTENCEPIECE in meta:
        document = _converted(read_proto(base64.b64decode(meta[SENTENCEPIECE])))
        document["model"][META] = meta
    text = json.dumps(document, ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_bytes(text.encode())
    return "PreTrainedTokenizerFast"


def _converted(proto) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model."""
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    pieces = list(proto.pieces)
    unk = next((i for i, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    model: dict[str, Any] = {"byte_fallback": trainer.byte_fallback}
    if trainer.model_type == UNIGRAM:
        model |= {"type": "Unigram", "unk_id": unk, "vocab": [[piece.piece, piece.score] for piece in pieces]}
    elif trainer.model_type == BPE:
        model |= {
            "type": "BPE", "vocab": {piece.piece: i for i, piece in enumerate(pieces)}, "merges": _merges(pieces),
            "unk_token": None if unk is None else pieces[unk].piece, "fuse_unk": True,
        }  # fmt: skip
    else:
        raise InputError("the tokenizer is a SentencePiece model of words or characters; tokenizer.json has none")

    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replaced({"Regex": r"\A +| +\z"}, ""), _replaced({"Regex": " {2,}"}, " ")]
    spaces: list[dict[str, Any]] = [_replaced({"String": SPACE}, " ")]
    strip: list[dict[str, Any]] = []
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    steps.append(_replaced({"String": " "}, SPACE))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags, "special": kinds[piece.type]}
            for i, piece in enumerate(pieces)
            if piece.type in kinds
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": model,
    }


def _replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(pieces: list) -> list[list[str]]:
    """The pairs that make a piece, best score first: sentencepiece merges the pair whose piece has the best score."""
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    found = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [[left, right] for _, left, right in sorted(found, key=lambda pair: pair[0])]
