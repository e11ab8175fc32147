"""Every tokenizer behind one interface: text to ids, ids to text, whole or as a stream."""

import codecs
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers

from llm.errors import InputError
from llm.tokenization import chat
from llm.tokenization.backends import Backend, HuggingFace, any_of, restored
from llm.tokenization.spec import END_OF_TEXT

FORMAT = "llm tokenizer 1"
# What a special token is for, by the names that tokenizers in use give it.
ROLES = {
    "end_of_text": (END_OF_TEXT, "<|end_of_text|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "bos": ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("[EOS]", "</s>", "<eos>"),
}


class Tokenizer:
    """Text to ids and back. Ids run from 0 to `vocab_size` - 1; some of them may not be assigned.

    What comes back: byte-level tokenizers ("bpe", "bytes", GPT-2's, tiktoken's), "chars" and the "unigram" trained here
    give exactly the text, any text. WordPiece loses which blanks stood between words and around punctuation, control
    characters, the characters it does not know (they come back as [UNK]) and, where it is told to, case and accents. A
    SentencePiece model from elsewhere loses what its normalizer changes, often runs of spaces, and U+2581.

    Attributes:
        vocab_size: the highest id and one.
        special: the id of each special token by its text.
        end_of_text: opens and closes every document; where there is no such token the end-of-sequence one.
        pad, unk, cls, sep, mask, bos, eos: ids of the special tokens of that use. All of these are None where the
            tokenizer has none.
        sentinels: ids of <extra_id_0>, <extra_id_1> and so on.
        chat_template: the Jinja template that turns messages into text, None where there is none.
    """

    end_of_text: int | None
    pad: int | None
    unk: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    bos: int | None
    eos: int | None

    def __init__(self, backend: Backend, roles: Mapping[str, str] | None = None, chat_template: str | None = None):
        """Wraps a backend.

        Args:
            roles: the token of a role ("eos": "<|im_end|>") where its name does not say it.
            chat_template: the chat template.

        Raises:
            InputError: a role's token is not in the vocabulary, or the tokens can not be decoded one by one.
        """
        self.backend = backend
        self._pieces = backend.pieces()
        self.vocab_size = len(self._pieces.middle)
        if not self.vocab_size:
            raise InputError("the tokenizer has no tokens")
        self.special: dict[str, int] = {text: token.id for text, token in self._pieces.special.items()}
        self._special_text = {i: text for text, i in self.special.items()}
        self._special_pattern = any_of(self.special)
        self.chat_template = chat_template
        self._roles = dict(roles or {})
        for role, names in ROLES.items():
            token = self._roles.get(role)
            if token is not None and token not in self.special:
                raise InputError(f"the tokenizer's {role} token {token!r} is not one of its special tokens")
            found = [token] if token is not None else [name for name in names if name in self.special]
            setattr(self, role, self.special[found[0]] if found else None)
        if self.end_of_text is None:
            self.end_of_text = self.eos
        count = sum(f"<extra_id_{n}>" in self.special for n in range(len(self.special)))
        self.sentinels = tuple(self.special[f"<extra_id_{n}>"] for n in range(count))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text, nothing put around it.

        Args:
            allow_special: the texts of special tokens give their ids. Otherwise they are text like any other.

        Raises:
            InputError: the text holds a lone surrogate, which no encoding has bytes for.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores."""
        for text in texts:
            check(text)
        if not allow_special:
            return self.backend.encode_batch(texts)
        return [self.encode_parts(self.split(text)) for text in texts]

    def split(self, text: str) -> list[str | int]:
        """A text as runs of plain text and ids of the special tokens between them."""
        parts: list[str | int] = []
        end, stripped = 0, False
        for match in self._special_pattern.finditer(text):
            token = self._pieces.special[match[0]]
            plain = text[end : match.start()]
            plain = plain.lstrip() if stripped else plain
            parts += [plain.rstrip() if token.lstrip else plain, token.id]
            end, stripped = match.end(), token.rstrip
        return [*parts, text[end:].lstrip() if stripped else text[end:]]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of parts of one text, plain text encoded and ids as they are."""
        ids: list[int] = []
        for n, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                check(part)
                ids += self.backend.encode_batch([part], continues=n > 0)[0]
        return ids

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of ids; bytes that are not valid UTF-8 become U+FFFD.

        Args:
            continues: the ids go on with a text, so a space at their start stays. A special token gives its text and
                starts a new text.
        """
        return self.bytes(ids, continues).decode("utf-8", errors="replace")

    def bytes(self, ids: Iterable[int], continues: bool = False) -> bytes:
        """The exact bytes of ids; special tokens give their text.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        out = []
        table = self._pieces.middle if continues else self._pieces.start
        for i in ids:
            piece = table[i] if 0 <= i < self.vocab_size else None
            if piece is None:
                raise InputError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            out.append(piece)
            table = self._pieces.start if i in self._special_text else self._pieces.middle
        return b"".join(out)

    def is_special(self, token: int) -> bool:
        """Whether an id is that of a special token."""
        return token in self._special_text

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """[vocab_size] bool: whether a piece that comes after another starts a word.

        A piece of WordPiece does unless it is marked by ##; any other unless its first character is a letter, digit or
        mark of a script with spaces between words, or the inside of a character. In Chinese, Japanese and Thai every
        character is a start.
        """
        return self._pieces.starts_word()

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Which of [..., T] ids start a word: as `starts_word`, and the first of all and those after special tokens."""
        special = np.zeros(self.vocab_size, bool)
        special[list(self._special_text)] = True
        starts = self.starts_word[ids]
        starts[..., :1] = True
        starts[..., 1:] |= special[ids[..., :-1]]
        return starts

    def chat(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables) -> list[int]:
        """The ids of a conversation by the tokenizer's own chat template.

        Special tokens of the template become their ids; what looks like one inside a message is plain text.

        Args:
            messages: each a role and a content, {"role": "user", "content": "Hello"}.
            add_generation_prompt: ends with the opening of the assistant's turn.
            variables: what else the template asks for, such as `tools`.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        return self.encode_parts(chat.parts(self, messages, add_generation_prompt, variables))

    def chat_text(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables) -> str:
        """The text that `chat` encodes, to be read: it no longer tells special tokens from text that looks like them."""
        parts = chat.parts(self, messages, add_generation_prompt, variables)
        return "".join(self._special_text[part] if isinstance(part, int) else part for part in parts)

    def with_special(self, tokens: Sequence[str] = (), sentinels: int = 0) -> "Tokenizer":
        """This tokenizer with those special tokens that it lacks, then <extra_id_n> to <extra_id_0>, at the top."""
        names = [*tokens, *(f"<extra_id_{n}>" for n in reversed(range(sentinels)))]
        missing = [name for name in names if name not in self.special]
        if not missing:
            return self
        return Tokenizer(self.backend.with_special(missing), self._roles, self.chat_template)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the tokenizer does."""
        return hashlib.sha256(self._content(None).encode()).hexdigest()[:16]

    def save(self, path: pathlib.Path) -> None:
        """Writes one file that `load` reads.

        It is a tokenizer.json of Hugging Face's `tokenizers` where such a file says everything; else our own JSON around
        it, with the roles and the chat template, or with the SentencePiece model or the ranks of tiktoken.
        """
        path.write_text(self._content(1), encoding="utf-8")

    def _content(self, indent: int | None) -> str:
        if isinstance(self.backend, HuggingFace) and not self._roles and self.chat_template is None:
            return self.backend.library.to_str(pretty=indent is not None)
        data = {"format": FORMAT, "roles": self._roles, "chat_template": self.chat_template} | self.backend.data()
        return json.dumps(data, ensure_ascii=False, indent=indent)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Tokenizer":
        """Reads the tokenizer that `save` wrote, or a tokenizer.json by itself.

        Raises:
            InputError: the file is missing or not a tokenizer.
        """
        if not path.is_file():
            raise InputError(f"there is no tokenizer at {path}")
        try:
            content = path.read_text(encoding="utf-8")
            if f'"{FORMAT}"' not in content[:100]:
                return cls(HuggingFace(tokenizers.Tokenizer.from_str(content)))
            data = json.loads(content)
            return cls(restored(data), data["roles"], data["chat_template"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # the libraries raise a bare Exception
            raise InputError(f"{path} is not a tokenizer: {type(error).__name__} {error}") from None


class StreamDecoder:
    """Decodes ids one at a time and holds back the bytes of unfinished characters.

    The pieces put together are `decode` of all the ids.

    Args:
        continues: the ids go on with a text, as those drawn after a prompt do.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._continues = continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that one more id completes, perhaps none."""
        text = self._decoder.decode(self._tokenizer.bytes([token], self._continues))
        self._continues = not self._tokenizer.is_special(token)
        return text

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that never came to its end."""
        return self._decoder.decode(b"", final=True)


def check(text: str) -> None:
    """Refuses a text that has no bytes.

    Raises:
        InputError: it holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"the text has a lone surrogate U+{code:04X} at character {error.start}; it is not valid Unicode"
        ) from None
