"""The libraries that turn text into ids: Hugging Face's tokenizers, and sentencepiece for its own models."""

import base64
import functools
import json
from typing import Any, Protocol, cast

from llm.errors import InputError
from llm.tokenization.pieces import Pieces
from llm.tokenization.special import Special

SENTENCEPIECE, MARIAN = "sentencepiece", "marian"


class Backend(Protocol):
    """What a tokenizer needs of a library. `ids` and `specials` are by token; the methods take valid Unicode."""

    kind: str
    ids: dict[str, int]
    specials: dict[str, Special]
    pieces: Pieces

    def encode_batch(self, texts: list[str], target: bool = False) -> list[list[int]]:
        """The ids of each text; none of them is special. `target`: as Marian's translations, not as what it reads."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and their [start, end) in characters, white space included."""
        ...

    def encode_part(self, text: str, first: bool) -> list[int]:
        """The ids of a part of a text between special tokens, `first` at its very start."""
        ...


def make_backend(document: dict[str, Any], meta: dict[str, Any]) -> Backend:
    """The library for a tokenizer.json.

    Raises:
        InputError: the file asks for what cannot be done.
    """
    if SENTENCEPIECE in meta:
        return SentencePieceBackend(base64.b64decode(meta[SENTENCEPIECE]))
    if MARIAN in meta:
        return MarianBackend(document, *(base64.b64decode(meta[MARIAN][name]) for name in ("source", "target")))
    return HuggingFaceBackend(document)


class HuggingFaceBackend:
    """Text through Hugging Face's `tokenizers`.

    The library gets a copy of the file in which text cannot become a special token: there the special tokens are
    no added tokens, and their entries begin with a space, which no word that is looked up does (spaces are split off,
    or spelled U+2581 or U+0120 by then). Padding, truncation, dropout and post-processing are left out too.
    """

    def __init__(self, document: dict[str, Any]):
        model = document["model"]
        self.kind: str = str(model.get("type") or _guess(model)).lower()
        entries = dict(enumerate(piece for piece, _ in model["vocab"])) if self.kind == "unigram" else {
            i: piece for piece, i in model["vocab"].items()
        }  # fmt: skip
        added = document.get("added_tokens") or []
        entries.update({token["id"]: token["content"] for token in added})
        size = max(entries, default=-1) + 1
        self.ids = {piece: i for i, piece in entries.items()}
        self.specials = {
            token["content"]: Special(token["id"], token.get("lstrip", False), token.get("rstrip", False))
            for token in added
            if token.get("special")
        }
        unk = model["unk_id"] if self.kind == "unigram" else self.ids.get(model.get("unk_token") or "")
        special = {s.id for s in self.specials.values()}
        literal = {token["id"] for token in added} | ({unk} if unk is not None else set())
        style, prefix, added_space = _decoding(document)
        self.pieces = Pieces(
            [entries.get(i) for i in range(size)], literal, special, style, prefix, added_space=added_space
        )
        self._document = _without_specials(document, self.kind, entries, size, special, unk)
        self._library = _library(self._document)

    @functools.cached_property
    def _continued(self):
        """The library for text after a special token, which may get no space in front."""
        pre = self._document.get("pre_tokenizer")
        changed, found = _never_prepend(pre)
        return _library({**self._document, "pre_tokenizer": changed}) if found else self._library

    def encode_batch(self, texts: list[str], target: bool = False) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_part(self, text: str, first: bool) -> list[int]:
        return (self._library if first else self._continued).encode(text, add_special_tokens=False).ids


def _guess(model: dict[str, Any]) -> str:
    """Old files do not name the kind."""
    if "merges" in model:
        return "BPE"
    if "unk_id" in model:
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _library(document: dict[str, Any]):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(str(error)) from None


def _without_specials(document: dict, kind: str, entries: dict[int, str], size: int, special: set[int], unk) -> dict:
    """The copy of a file in which no text is a special token; every id stands where it stood."""
    names = {i: " " + piece if i in special else piece for i, piece in entries.items()}
    model = {**document["model"], "type": document["model"].get("type") or _guess(document["model"])}
    model.pop("llm", None)
    if model.get("dropout") is not None:
        model["dropout"] = None
    if kind == "unigram":
        scores = {i: score for i, (_, score) in enumerate(model["vocab"])}
        model["vocab"] = [[names.get(i, f" hole {i}"), scores.get(i, 0.0)] for i in range(size)]
    else:
        # The library gives new added tokens the ids after its vocabulary: with all of them in it, no id moves.
        model["vocab"] = {names.get(i, f" hole {i}"): i for i in range(size)}
        if unk is not None:
            model["unk_token"] = names[unk]
        if model.get("merges"):
            # A special token that merges would make is made no more.
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            renamed = {entries[i] for i in special if i in entries}
            model["merges"] = [pair for pair in pairs if not renamed & {*pair, "".join(pair)}]
    added = [token for token in document.get("added_tokens") or [] if token["id"] not in special]
    return {**document, "model": model, "added_tokens": added, "truncation": None, "padding": None,
            "post_processor": None}  # fmt: skip


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def _decoding(document: dict[str, Any]) -> tuple[str, str, str]:
    """How a file spells text: style, prefix and added space of `Pieces`."""
    decoders = {step["type"]: step for step in _steps(document.get("decoder"), "decoders")}
    unknown = decoders.keys() - {"ByteLevel", "WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if unknown:
        raise InputError(
            f"its decoder {min(unknown)} is not known; ByteLevel, WordPiece, Metaspace and ByteFallback are"
        )
    before = _steps(document.get("pre_tokenizer"), "pretokenizers")
    added_space = "never"
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in before):
        added_space = "always"
    for step in before:
        if step["type"] == "Metaspace":
            added_space = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    if any(step["type"] == "Prepend" for step in _steps(document.get("normalizer"), "normalizers")):
        added_space = "always"
    if "ByteLevel" in decoders:
        return "byte_level", "", added_space
    if "WordPiece" in decoders:
        return "wordpiece", decoders["WordPiece"].get("prefix", "##"), "never"
    if "Metaspace" in decoders or "Replace" in decoders:
        return "metaspace", "", added_space
    if "ByteFallback" in decoders or "Fuse" in decoders:
        return "plain", "", "never"
    # Without a decoder, words stand with spaces between them.
    return "wordpiece", "\0", "never"


def _never_prepend(part: Any) -> tuple[Any, bool]:
    """A pre-tokenizer whose Metaspace puts a space at the start alone, as it works after the start."""
    if part is None:
        return None, False
    if part["type"] == "Sequence":
        inner = [_never_prepend(one) for one in part["pretokenizers"]]
        return {**part, "pretokenizers": [one for one, _ in inner]}, any(found for _, found in inner)
    if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first":
        return {**part, "prepend_scheme": "never"}, True
    return part, False


class SentencePieceBackend:
    """Text through sentencepiece. Its control symbols are the special tokens: text never becomes one."""

    kind = SENTENCEPIECE

    def __init__(self, data: bytes):
        import sentencepiece

        model = read_proto(data)
        self._library: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        types = [piece.type for piece in model.pieces]
        entries: list[str | None] = [piece.piece for piece in model.pieces]
        control, unknown, byte = (_ids(types, kind) for kind in (CONTROL, UNKNOWN, BYTE))
        self.ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self.specials = {model.pieces[i].piece: Special(i) for i in sorted(control)}
        spaces = "always" if model.normalizer_spec.add_dummy_prefix else "never"
        self.pieces = Pieces(entries, control | unknown, control, "metaspace", added_space=spaces, byte_ids=byte)

    def encode_batch(self, texts: list[str], target: bool = False) -> list[list[int]]:
        return self._library.encode(texts, out_type=int)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        pieces = self._library.encode(text, out_type="proto").pieces
        return [piece.id for piece in pieces], _characters(text, pieces)

    def encode_part(self, text: str, first: bool) -> list[int]:
        return self._library.encode(text, out_type=int)


def _characters(text: str, pieces) -> list[tuple[int, int]]:
    """The [start, end) of sentencepiece's pieces in characters; it counts bytes."""
    character = [n for n, c in enumerate(text) for _ in c.encode()] + [len(text)]
    return [(character[piece.begin], character[piece.end]) for piece in pieces]


class MarianBackend:
    """Two SentencePiece models, of what is read and of what is written, over the ids of one vocab.json.

    A text that begins with a code, >>fra<<, has it as its first token, as Marian's models of several languages want it.
    A piece that the vocabulary lacks is unknown.
    """

    kind = MARIAN

    def __init__(self, document: dict[str, Any], source: bytes, target: bytes):
        import sentencepiece

        for data in (source, target):
            read_proto(data)
        self._source, self._target = (
            cast(Any, sentencepiece.SentencePieceProcessor(model_proto=data)) for data in (source, target)
        )
        self.ids: dict[str, int] = dict(document["model"]["vocab"])
        added = document["added_tokens"]
        self.ids.update({token["content"]: token["id"] for token in added})
        self.specials = {token["content"]: Special(token["id"]) for token in added}
        self._unk = self.ids["<unk>"]
        self._words = {piece: i for piece, i in self.ids.items() if piece not in self.specials}
        names = {i: piece for piece, i in self.ids.items()}
        special = {token["id"] for token in added}
        entries = [names.get(i) for i in range(max(names) + 1)]
        self.pieces = Pieces(entries, special, special, "metaspace", added_space="always", byte_ids=set())

    def encode_batch(self, texts: list[str], target: bool = False) -> list[list[int]]:
        parts = [_code(text) for text in texts]
        rows = (self._target if target else self._source).encode([text for _, text in parts], out_type=str)
        return [[self._id(piece) for piece in code + row] for (code, _), row in zip(parts, rows)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        code, rest = _code(text)
        pieces = self._source.encode(rest, out_type="proto").pieces
        first = len(text) - len(rest)
        offsets = [(0, first)] * len(code) + [(first + start, first + end) for start, end in _characters(rest, pieces)]
        return [self._id(piece) for piece in [*code, *(piece.piece for piece in pieces)]], offsets

    def encode_part(self, text: str, first: bool) -> list[int]:
        return self.encode_batch([text])[0]

    def _id(self, piece: str) -> int:
        return self._words.get(piece, self._unk)


def _code(text: str) -> tuple[list[str], str]:
    """The code of a language that a text begins with, as a list, and the rest."""
    end = text.find("<<") + 2 if text.startswith(">>") else 0
    return ([text[:end]], text[end:]) if end > 1 else ([], text)


# ModelProto.SentencePiece.Type of sentencepiece_model.proto; GGUF has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def _ids(types: list[int], kind: int) -> set[int]:
    return {i for i, type_ in enumerate(types) if type_ == kind}


def new_proto():
    """An empty ModelProto of SentencePiece."""
    from sentencepiece import sentencepiece_model_pb2

    return getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - made when the module is imported


def read_proto(data: bytes):
    """The ModelProto of a SentencePiece file.

    Raises:
        InputError: it is none.
    """
    from google.protobuf.message import DecodeError

    model = new_proto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError("it is no SentencePiece model") from None
    if not model.pieces:
        raise InputError("it is no SentencePiece model, or one without pieces")
    return model
