"""The three libraries that encode, each behind the same four methods.

`tokenizers` runs everything that its file format says exactly. A SentencePiece model and tiktoken's ranks stay as they
are and are run by their own libraries, imported when such a tokenizer is opened: converted, they would differ on texts
such as "<0x41>", or where two regular-expression engines disagree.
"""

import base64
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import tokenizers

from llm.errors import InputError
from llm.tokenization.pieces import Pieces, Special, decoded, placed, sentencepiece_pieces

META = "\u2581"  # the visible space of SentencePiece


class Backend(Protocol):
    """Text to ids without special tokens, and what the ids stand for."""

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """The ids of each text; `continues`: of texts that go on with another, so that no space is put before them."""
        ...

    def pieces(self) -> Pieces:
        """What each id stands for."""
        ...

    def with_special(self, tokens: Sequence[str]) -> "Backend":
        """This one with more special tokens, at the next free ids."""
        ...

    def data(self) -> dict:
        """What makes an equal backend by `restored`: JSON values."""
        ...


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
        """As `Backend` says. A model that finds a special token in plain text is made to read it in two parts."""
        library = self._continuing if continues else self.library
        batch = [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]
        for n, ids in enumerate(batch):
            if not self._hidden.isdisjoint(ids):
                batch[n] = self._broken(texts[n], continues)
        return batch

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        """Ids that plain text must not give; that of the unknown it may."""
        unknown = getattr(self.library.model, "unk_token", None)
        if type(self.library.model).__name__ == "Unigram":
            number = json.loads(self.library.to_str())["model"]["unk_id"]
            unknown = None if number is None else self.library.id_to_token(number)
        return frozenset(token.id for text, token in self._special().items() if text != unknown)

    def _broken(self, text: str, continues: bool) -> list[int]:
        if self.library.normalizer is not None:
            text = self.library.normalizer.normalize_str(text)
        names = [name for name, token in self._special().items() if token.id in self._hidden]
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, name[:1] + "\x00" + name[1:]) if "\x00" not in text else _between(text, name)
        ids: list[int] = []
        for n, part in enumerate(text.split("\x00")):
            library = self._continuing if continues or n else self.library
            ids += library.encode(part, add_special_tokens=False).ids
        if not self._hidden.isdisjoint(ids):
            found = next(name for name, token in self._special().items() if token.id in ids)
            raise InputError(f"this tokenizer can not write {found!r} as plain text: take it out of the text")
        return ids

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        state = "" if self.library.pre_tokenizer is None else self.library.pre_tokenizer.__getstate__().decode()
        if '"prepend_scheme":"first"' not in state:
            return self.library
        content = json.loads(self.library.to_str())
        content["pre_tokenizer"] = json.loads(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        return HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(content))).library

    def _special(self) -> dict[str, Special]:
        added = self.library.get_added_tokens_decoder()
        return {t.content: Special(i, t.lstrip, t.rstrip) for i, t in sorted(added.items()) if t.special}

    def pieces(self) -> Pieces:
        """As `Backend` says.

        Raises:
            InputError: the decoder is none that works token by token.
        """
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            tokens[i] = token
        if self.library.decoder is None:
            raise InputError("the tokenizer has no decoder, so what its ids stand for is not known")
        added = set(self.library.get_added_tokens_decoder())
        return Pieces_of(decoded(tokens, added, self.library.decoder.__getstate__().decode()), self._special())

    def with_special(self, tokens: Sequence[str]) -> "HuggingFace":
        """As `Backend` says."""
        library = tokenizers.Tokenizer.from_str(self.library.to_str())
        library.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens])
        return HuggingFace(library)

    def data(self) -> dict:
        """As `Backend` says."""
        return {"library": "tokenizers", "tokenizer": json.loads(self.library.to_str())}


def Pieces_of(tables: tuple, special: dict[str, Special]) -> Pieces:  # noqa: N802
    start, middle, continues = tables
    return Pieces(start, middle, special, continues)
