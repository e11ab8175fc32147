"""The three libraries that encode, each behind the same four methods.

`tokenizers` runs everything that its file format says exactly. A SentencePiece model and tiktoken's ranks stay as they
are and are run by their own libraries, imported when such a tokenizer is opened: converted, they would differ on texts
such as "<0x41>", or where two regular-expression engines disagree.
"""

import base64
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import tokenizers

from llm.errors import InputError
from llm.tokenization.pieces import Pieces, Special, decoded, placed, sentencepiece_pieces

SPACE = "\u2581"  # the visible space of SentencePiece


class Backend(Protocol):
    """Text to ids without special tokens, and what the ids stand for."""

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """The ids of each text; `continues`: of texts that go on with another, so no space is put before them."""
        ...

    def pieces(self) -> Pieces:
        """What each id stands for."""
        ...

    def with_special(self, tokens: Sequence[str]) -> "Backend":
        """This one with more special tokens, at the next free ids."""
        ...

    def data(self) -> dict:
        """JSON values that `restored` makes an equal backend of."""
        ...


def restored(data: Mapping) -> Backend:
    """The backend that `data` came from.

    Raises:
        InputError: its library is unknown.
    """
    if data["library"] == "tokenizers":
        return HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(data["tokenizer"])))
    if data["library"] == "sentencepiece":
        return SentencePiece(base64.b64decode(data["model"]), data["special"], data["lossless"])
    if data["library"] == "tiktoken":
        return Tiktoken(data["ranks"], data["pattern"], data["special"])
    raise InputError(f"the tokenizer's library {data['library']!r} is not tokenizers, sentencepiece or tiktoken")


class HuggingFace:
    """Runs a tokenizer of the `tokenizers` library."""

    def __init__(self, library: tokenizers.Tokenizer):
        self.library = library
        library.no_truncation()  # files carry the lengths of the model that they were made for
        library.no_padding()
        library.encode_special_tokens = True  # the text of a special token is text
        if getattr(library.model, "dropout", None):
            library.model.dropout = None  # type: ignore[attr-defined]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """As `Backend` says. Where the model finds a special token in plain text, it reads that token in two parts.

        Raises:
            InputError: a text holds a special token that even so can not be written as text.
        """
        library = self._continuing if continues else self.library
        batch = [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]
        for n, ids in enumerate(batch):
            if not self._hidden.isdisjoint(ids):
                batch[n] = self._in_parts(texts[n], continues)
        return batch

    def pieces(self) -> Pieces:
        """As `Backend` says.

        Raises:
            InputError: the decoder is none that works token by token.
        """
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            tokens[i] = token
        if self.library.decoder is None:
            raise InputError("the tokenizer has no decoder, so what its ids stand for is not known")
        added = set(self.library.get_added_tokens_decoder())
        start, middle, continues = decoded(tokens, added, self.library.decoder.__getstate__().decode())
        return Pieces(start, middle, self._special, continues)

    def with_special(self, tokens: Sequence[str]) -> "HuggingFace":
        """As `Backend` says."""
        library = tokenizers.Tokenizer.from_str(self.library.to_str())
        library.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens])
        return HuggingFace(library)

    def data(self) -> dict:
        """As `Backend` says."""
        return {"library": "tokenizers", "tokenizer": json.loads(self.library.to_str())}

    @functools.cached_property
    def _special(self) -> dict[str, Special]:
        added = self.library.get_added_tokens_decoder()
        return {t.content: Special(i, t.lstrip, t.rstrip) for i, t in sorted(added.items()) if t.special}

    @functools.cached_property
    def _hidden(self) -> dict[int, str]:
        """Special tokens that plain text must not give; the unknown it may."""
        unknown = getattr(self.library.model, "unk_token", None)
        if type(self.library.model).__name__ == "Unigram":
            number = json.loads(self.library.to_str())["model"]["unk_id"]
            unknown = None if number is None else self.library.id_to_token(number)
        return {token.id: text for text, token in self._special.items() if text != unknown}

    def _in_parts(self, text: str, continues: bool) -> list[int]:
        if self.library.normalizer is not None:
            text = self.library.normalizer.normalize_str(text)
        cuts = [match.start() + 1 for match in any_of(self._hidden.values()).finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        ids: list[int] = []
        for n, part in enumerate(parts):
            library = self._continuing if continues or n else self.library
            ids += library.encode(part, add_special_tokens=False).ids
        found = next((self._hidden[i] for i in ids if i in self._hidden), None)
        if found is not None:
            raise InputError(f"this tokenizer can not write {found!r} as plain text: take it out of the text")
        return ids

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same without the space that goes before the first word of a text only."""
        state = "" if self.library.pre_tokenizer is None else self.library.pre_tokenizer.__getstate__().decode()
        if '"prepend_scheme":"first"' not in state:
            return self.library
        content = json.loads(self.library.to_str())
        content["pre_tokenizer"] = json.loads(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        return HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(content))).library


class SentencePiece:
    """Runs a SentencePiece model.

    Args:
        model: the file, a serialised ModelProto.
        special: ids of special tokens put on top of the model's.
        lossless: the model, trained here, leaves spaces to this class: one goes before a text, so that a word is the
            same piece at its start and inside; and U+2581, which the model would take for a space, is given as bytes.
    """

    def __init__(self, model: bytes, special: Mapping[str, int], lossless: bool = False):
        import sentencepiece  # 3 MB, for such models only

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError("this is not a SentencePiece model") from None
        self._proto, self._added, self._lossless = model, dict(special), lossless

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """As `Backend` says; a model that was not trained here may put a space before a text that continues, too."""
        if not self._lossless:
            return self._run(texts)
        lines = [text if continues or not text else " " + text for text in texts]
        parts = [line.split(SPACE) for line in lines]
        ids = iter(self._run([part for split in parts for part in split]))
        joint = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return [_joined([next(ids) for _ in split], joint) for split in parts]

    def pieces(self) -> Pieces:
        """As `Backend` says."""
        prefixed = self._lossless or self._model.decode_pieces([SPACE + "a"]) == "a"
        return sentencepiece_pieces(self._model, {t: Special(i) for t, i in self._added.items()}, prefixed)

    def with_special(self, tokens: Sequence[str]) -> "SentencePiece":
        """As `Backend` says."""
        top = max([self._model.get_piece_size() - 1, *self._added.values()])
        more = {token: top + 1 + n for n, token in enumerate(tokens)}
        return SentencePiece(self._proto, self._added | more, self._lossless)

    def data(self) -> dict:
        """As `Backend` says."""
        model = base64.b64encode(self._proto).decode()
        return {"library": "sentencepiece", "special": self._added, "lossless": self._lossless, "model": model}

    def _run(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)


class Tiktoken:
    """Runs tiktoken on a table of ranks.

    Args:
        ranks: the text of a .tiktoken file: lines of a token in base64 and its rank, which is its id.
        pattern: the regular expression that splits text before merging.
        special: ids of the special tokens.
    """

    def __init__(self, ranks: str, pattern: str, special: Mapping[str, int]):
        import tiktoken  # 4 MB, for such ranks only

        try:
            pairs = (line.split() for line in ranks.splitlines() if line)
            self._ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError:
            raise InputError("these are not ranks of tiktoken, lines of a token in base64 and its number") from None
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ranks]
        if missing:
            raise InputError(f"the ranks have no token for {len(missing)} bytes, the first {missing[0]:#04x}")
        self._text, self._pattern, self._added = ranks, pattern, dict(special)
        try:
            self._library = tiktoken.Encoding(
                "ranks", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._added
            )
        except ValueError as error:
            raise InputError(f"tiktoken does not take the pattern {pattern!r}: {error}") from None

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """As `Backend` says."""
        return self._library.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def pieces(self) -> Pieces:
        """As `Backend` says."""
        table: list[bytes | None] = [None] * (max(self._ranks.values()) + 1)
        for piece, i in self._ranks.items():
            table[i] = piece
        special = {text: Special(i) for text, i in self._added.items()}
        return Pieces(*placed(table, table, special), special)

    def with_special(self, tokens: Sequence[str]) -> "Tiktoken":
        """As `Backend` says."""
        top = max([*self._ranks.values(), *self._added.values()])
        more = {token: top + 1 + n for n, token in enumerate(tokens)}
        return Tiktoken(self._text, self._pattern, self._added | more)

    def data(self) -> dict:
        """As `Backend` says."""
        return {"library": "tiktoken", "special": self._added, "pattern": self._pattern, "ranks": self._text}


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A regular expression of any of some texts, longer ones first; of none, one that never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _joined(parts: list[list[int]], joint: list[int]) -> list[int]:
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, *joint, *part]
    return ids
