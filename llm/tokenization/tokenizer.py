"""Every tokenizer behind one interface, and the one file that each of them is saved in.

The file is Hugging Face's tokenizer.json, and their `tokenizers` reads it too. What that format has no place for stands
in its "model" object under "llm": the roles of special tokens and the chat template. A SentencePiece model, which the
format cannot say exactly, stands there whole, in base64, and its text goes through the sentencepiece library; so do the
two of a Marian tokenizer. Such files only this module reads.
"""

import codecs
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llm.errors import InputError
from llm.tokenization import export, special
from llm.tokenization.backends import Backend, make_backend
from llm.tokenization.chat import ASSISTANT, Rendered, render
from llm.tokenization.pieces import Joiner

META = export.META
Spellings = list[bytes | None]


class Tokenizer:
    """Text to ids and back. Ids run from 0 to `vocab_size` - 1; `opens` opens every document, `end_of_text` closes it.

    What comes back from `decode(encode(text))`:
        byte-level bpe, bytes, chars: every text, exactly, unless a loaded file normalises it (NFC in Qwen's).
        unigram as `train` makes it: every text in which no U+2581 stands, exactly; U+2581 comes back as a space.
        wordpiece: the words with one space between them, punctuation and Chinese characters as words of their own,
            control characters gone, a word with a character that the vocabulary lacks as [UNK]; lower case, or without
            accents, where asked for.
        SentencePiece files, Marian's too: what their own normalisation leaves (T5's: NFKC, runs of spaces as one).

    Text becomes a special token only by `allow_special=True`, or where a chat template itself writes the token.

    Attributes:
        kind: "bpe", "wordpiece", "unigram", "wordlevel", "sentencepiece" or "marian", the algorithm in the file.
        vocab_size: one more than the highest id.
        end_of_text: of a trained tokenizer, <|endoftext|>; of a loaded one, what its files call the end of a sequence,
            else the first of <|endoftext|>, </s>, <|end_of_text|>, <eos>, [EOS], [SEP] that it has.
        pad, unk, cls, sep, mask, bos: ids of the tokens with these roles, or None.
        opens: what opens a document: the end of text, or what the file of an imported model's tokenizer says.
        sentinels: the ids of <extra_id_0>, <extra_id_1>, ...; they descend.
        chat_template: Jinja source, or None.
    """

    def __init__(self, text: str):
        """Makes a tokenizer of the text of a tokenizer.json.

        Raises:
            InputError: it cannot be read.
        """
        self._text = text
        document = json.loads(text)
        if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
            raise InputError("it has no model")
        meta: dict[str, Any] = document["model"].get(META) or {}
        self._backend: Backend = make_backend(document, meta)
        self.kind: str = self._backend.kind
        self._pieces = self._backend.pieces
        self.vocab_size: int = len(self._pieces.entries)
        self._splitter = special.Splitter(self._backend.specials)
        self.chat_template: str | None = meta.get("chat_template")
        roles = {role: self._role(role, meta.get("roles") or {}) for role in special.NAMES}
        if roles["end_of_text"] is None:
            names = ", ".join(special.NAMES["end_of_text"])
            raise InputError(
                f"the tokenizer has no token {special.END_OF_TEXT}, nor another end of text ({names}); add one by "
                f"tokenizer.special_tokens=('{special.END_OF_TEXT}',)"
            )
        self.end_of_text: int = roles["end_of_text"]
        self.pad, self.unk, self.cls = roles["pad"], roles["unk"], roles["cls"]
        self.sep, self.mask, self.bos = roles["sep"], roles["mask"], roles["bos"]
        ids = self._backend.ids
        self.opens: int = ids.get((meta.get("roles") or {}).get("opens", ""), self.end_of_text)
        self.sentinels: tuple[int, ...] = special.sentinels({token: ids[token] for token in self._splitter.specials})

    def _role(self, role: str, said: dict[str, str]) -> int | None:
        ids = self._backend.ids
        if said.get(role) in ids:
            return ids[said[role]]
        return next((ids[name] for name in special.NAMES[role] if name in self._splitter.specials), None)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {token: s.id for token, s in self._splitter.specials.items()}

    def token(self, i: int) -> str:
        """The entry of the vocabulary, as its file spells it."""
        self._check([i])
        entry = self._pieces.entries[i]
        assert entry is not None
        return entry

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text, without special tokens around it.

        Args:
            text: any Unicode.
            allow_special: the text of a special token becomes the token; only for text from a trusted hand.

        Raises:
            InputError: the text holds a lone surrogate, which no encoding has bytes for, or a byte-level vocabulary
                lacks one of its bytes (SmolLM2's has none for U+0004).
        """
        if not allow_special:
            return self.encode_batch([text])[0]
        self._check_text([text])
        return self._encode_parts(self._splitter(text))

    def encode_batch(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores.

        `target`: the texts are translations, which Marian's tokenizers cut by a model of their own; others do not care.
        """
        self._check_text(texts)
        return self._backend.encode_batch(list(texts), target)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the characters of the text [start, end) that it stands for.

        White space at the ends of a token is left out, unless the token is nothing else. Tokens that are parts of one
        character all have that character.
        """
        self._check_text([text])
        ids, offsets = self._backend.encode_with_offsets(text)
        offsets = _character_of_bytes(text, [self._pieces.spelled[i] or b"" for i in ids], offsets)
        return ids, [_trimmed(text, start, end) for start, end in offsets]

    def _encode_parts(self, parts: list[str | int], first: bool = True) -> list[int]:
        """The ids of parts; `first` says whether they begin a text."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self._backend.encode_part(part, first and place == 0)
        return ids

    def chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation, by the tokenizer's own template.

        Control tokens come from the template alone: nothing that stands in `messages` or `variables` becomes a special
        token, not even together with text beside it (`llm.tokenization.chat` says how). Tokens that the file adds
        without calling them special, such as Qwen's <think>, are ordinary words, here as in `encode`. No token has a
        part of an answer and a part of what was written to ask for it: the ids begin with those that were answered.

        Args:
            messages: {"role": ..., "content": ...} each, and what else the template reads.
            add_generation_prompt: ends with the opening of the assistant's answer.
            variables: further variables of the template, such as tools.

        Raises:
            InputError: no template, one that fails, or messages that it refuses.
        """
        rendered = self._rendered(messages, add_generation_prompt, variables)
        return [i for part in self._cut(rendered, [place for place in rendered.answers if place]) for i in part]

    def chat_answers(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """(the ids of a whole conversation, which of them the assistant writes: its answers and what ends each).

        Before each answer stand the ids that `chat` gives for the messages before it. The ids end with the last answer.

        Raises:
            InputError: as `chat` does; no answer; one that nobody asked for; a template that ends no answer by
                `end_of_turn`, or that writes a question in another way once it is answered.
        """
        end = self.end_of_turn
        if end is None:
            raise InputError("the chat template ends an answer by no special token: nothing would end what is written")
        rendered = self._rendered(messages, False, {})
        if not rendered.answers:
            raise InputError("no message of the conversation is the assistant's: there is nothing to learn")
        places = []
        for number, place in enumerate(rendered.answers):
            if place is None:
                raise InputError(
                    f"the chat template writes the messages before answer {number} otherwise than when it asks for it"
                )
            places.append(place)
        first, *answered = self._cut(rendered, places)
        ids, learned = list(first), [False] * len(first)
        for number, part in enumerate(answered):
            special = next((place for place, i in enumerate(part) if i in self._special_ids), None)
            if special is None or part[special] != end:
                raise InputError(f"the chat template does not end answer {number} by {self.token(end)!r}")
            ids += part
            learned += [place <= special for place in range(len(part))]
        after = learned[::-1].index(True)
        return ids[: len(ids) - after], learned[: len(learned) - after]

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The special token by which the chat template closes an answer; None where it closes it by none.

        Raises:
            InputError: as `chat` does.
        """
        asked = [{"role": "user", "content": "a"}]
        opened = self.chat(asked)
        closed = self.chat([*asked, {"role": ASSISTANT, "content": "b"}], add_generation_prompt=False)
        if closed[: len(opened)] != opened:
            return None
        return next((token for token in closed[len(opened) :] if token in self._special_ids), None)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def _rendered(self, messages, add_generation_prompt: bool, variables: dict[str, Any]) -> Rendered:
        if self.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template; load one whose files have it, give one in "
                "tokenizer.chat_template, or encode plain text"
            )
        tokens = {f"{name}_token": "" if i is None else self.token(i) for name, i in self._named().items()}
        return render(
            self.chat_template, messages, list(self._splitter.specials), add_generation_prompt, tokens, variables
        )

    def _cut(self, rendered: Rendered, places: Sequence[int]) -> list[list[int]]:
        """The ids of a rendered conversation in parts that begin at these places of its text, and at 0."""
        edges = [0, *places, len(rendered.text)]
        found = []
        for number, (start, end) in enumerate(zip(edges, edges[1:])):
            parts = self._splitter(rendered.text[start:end])
            texts = [rendered.restore(part) if isinstance(part, str) else part for part in parts]
            self._check_text([part for part in texts if isinstance(part, str)])
            found.append(self._encode_parts(texts, first=number == 0))
        return found

    def _named(self) -> dict[str, int | None]:
        return {"bos": self.bos, "eos": self.end_of_text, "pad": self.pad, "unk": self.unk, "cls": self.cls,
                "sep": self.sep, "mask": self.mask}  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens by their names; bytes that are not valid UTF-8 become U+FFFD."""
        return self.bytes(ids).decode("utf-8", errors="replace")

    def bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids, as from the start of a text; special tokens give their names."""
        ids = self._check(ids)
        joiner = Joiner(self._pieces)
        return b"".join([joiner.push(i) for i in ids])

    def _check(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            if self._pieces.entries[i] is None:
                raise InputError(f"token id {i} stands for nothing in this vocabulary")
        return checked

    def _check_text(self, texts: Sequence[str]) -> None:
        missing = self._pieces.missing_bytes
        for text in texts:
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise InputError(
                    f"the text has a lone surrogate U+{code:04X} at character {error.start}; it is not valid Unicode"
                ) from None
            if missing and len(data.translate(None, missing)) < len(data):
                place = next(n for n, c in enumerate(text) if set(c.encode()) & set(missing))
                raise InputError(
                    f"the text has U+{ord(text[place]):04X} at character {place}, for whose bytes this vocabulary has "
                    "no entry; remove it"
                )

    def text_bytes(self) -> tuple[Spellings, Spellings]:
        """(what each id writes at the start of a text, what it writes after others), as `bytes` joins them.

        None for ids that are no text: special tokens, the unknown one, and those that stand for nothing.
        """
        no_text = {*self.special_tokens.values(), self.unk}
        first: Spellings = [None] * self.vocab_size
        later = list(first)
        for i, entry in enumerate(self._pieces.entries):
            if entry is not None and i not in no_text:
                joiner = Joiner(self._pieces)
                first[i], later[i] = joiner.push(i), joiner.push(i)
        return first, later

    @property
    def starts_word(self) -> np.ndarray:
        """Which ids begin a word, bool (vocab_size,): for masking whole words.

        Of wordpiece, entries without "##". Otherwise entries that begin with white space, punctuation or a symbol:
        a letter or digit, or a part of a character, goes on with what stands before. Special tokens each begin.
        """
        return self._pieces.starts_word

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the tokenizer does: of its file."""
        return hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @functools.cached_property
    def ids_fingerprint(self) -> str:
        """A hash of everything but the chat template: tokenizers with the same one give every text the same ids."""
        return self.with_chat_template(None).fingerprint

    def save(self, path: pathlib.Path) -> None:
        """Writes tokenizer.json, which Hugging Face's `tokenizers` reads too unless it holds SentencePiece models."""
        path.write_bytes(self._text.encode())

    def export(self, folder: pathlib.Path) -> str:
        """Writes the files that Hugging Face's transformers reads it from; the name of its class there.

        Raises:
            InputError: a SentencePiece model that they have no place for (`llm.tokenization.export`).
        """
        return export.write(json.loads(self._text), folder)

    def with_roles(self, **ids: int) -> "Tokenizer":
        """The same tokenizer with these ids as its `end_of_text`, `bos`, `opens`, ...: what a model's own config says.

        Raises:
            InputError: an id that stands for nothing.
        """
        if all(getattr(self, role) == i for role, i in ids.items()):
            return self
        roles = (json.loads(self._text)["model"].get(META) or {}).get("roles") or {}
        return self._with(roles={**roles, **{role: self.token(i) for role, i in ids.items()}})

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer with this chat template, or with none."""
        return self if template == self.chat_template else self._with(chat_template=template)

    def _with(self, **meta: Any) -> "Tokenizer":
        """The same tokenizer with these entries of `META`; None takes one out."""
        document = json.loads(self._text)
        said = {**(document["model"].get(META) or {}), **meta}
        said = {name: value for name, value in said.items() if value is not None}
        model = {name: value for name, value in document["model"].items() if name != META}
        document["model"] = {**model, META: said} if said else model
        return Tokenizer(json.dumps(document, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: pathlib.Path) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote, or another tokenizer.json, without the files beside it.

        Raises:
            InputError: the file is missing or not a tokenizer.
        """
        if not path.is_file():
            raise InputError(f"there is no tokenizer at {path}")
        try:
            return cls(path.read_bytes().decode())
        except (InputError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a tokenizer: {error}") from None


class StreamDecoder:
    """Decodes ids one at a time and holds back the bytes of unfinished characters.

    The pieces and the flush, joined, are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._joiner = Joiner(tokenizer._pieces)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that one more id completes, perhaps none."""
        return self._decoder.decode(self._joiner.push(self._tokenizer._check([token])[0]))

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that never came to its end."""
        return self._decoder.decode(b"", final=True)


def _character_of_bytes(text: str, spelled: list[bytes], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which a byte of a character that the vocabulary lacks has that character.

    The libraries give such bytes a whole run of characters, or nothing.
    """
    fixed, n = list(offsets), 0
    while n < len(fixed):
        start, last = offsets[n][0], n
        while last < len(fixed) and len(spelled[last]) == 1 and offsets[last][0] == start:
            last += 1
        end = max((e for _, e in offsets[n:last]), default=start)
        data = text[start:end].encode()
        if last - n > 1 and b"".join(spelled[n:last]) == data:
            place = start
            while n < last:
                size = len(text[place].encode())
                fixed[n : n + size] = [(place, place + 1)] * size
                n, place = n + size, place + 1
        n = max(last, n + 1)
    return fixed


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    if not inner or inner.isspace():
        return start, end
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
