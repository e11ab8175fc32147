"""Byte-level tokenizers: any text in, the same text out."""

import codecs
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.errors import InputError
from llm.tokenization.spec import TokenizerSpec

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to ids and back. Ids run from 0 to `vocab_size` - 1; `end_of_text` opens and closes every document."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        # A document that contains the text of a special token gets ordinary ids for it.
        backend.encode_special_tokens = True
        self.vocab_size: int = backend.get_vocab_size()
        end = backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"the tokenizer has no token {END_OF_TEXT}")
        self.end_of_text: int = end

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            InputError: the text holds a lone surrogate, which no encoding has bytes for.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise InputError(
                    f"the text has a lone surrogate U+{code:04X} at character {error.start}; it is not valid Unicode"
                ) from None
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.bytes(ids).decode("utf-8", errors="replace")

    def bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; special tokens give their text."""
        pieces = []
        for i in ids:
            piece = self._backend.id_to_token(int(i))
            if piece is None:
                raise InputError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            pieces.append(piece.encode() if i == self.end_of_text else bytes(_BYTE_OF[c] for c in piece))
        return b"".join(pieces)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the tokenizer does."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    def save(self, path: pathlib.Path) -> None:
        """Writes tokenizer.json, which Hugging Face's `tokenizers` reads too."""
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: pathlib.Path) -> "Tokenizer":
        """Reads the tokenizer that `save` wrote.

        Raises:
            InputError: the file is missing or not a tokenizer.
        """
        if not path.is_file():
            raise InputError(f"there is no tokenizer at {path}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except InputError:
            raise
        except Exception as error:  # the backend raises a bare Exception
            raise InputError(f"{path} is not a tokenizer: {error}") from None


class StreamDecoder:
    """Decodes ids one at a time and holds back the bytes of unfinished characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that one more id completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.bytes([token]))

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that never came to its end."""
        return self._decoder.decode(b"", final=True)


def train(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer. The same texts in the same order give the same tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.entries,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def _byte_of() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (the table of GPT-2, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()
