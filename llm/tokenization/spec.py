"""The settings of the tokenizer."""

import dataclasses

from llm.errors import InputError

KINDS = ("bpe", "wordpiece", "unigram", "bytes", "chars")


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer is trained on the corpus, or which file it is loaded from.

    Attributes:
        kind: "bpe", byte-level byte-pair encoding; "wordpiece", BERT's; "unigram", SentencePiece's language model over
            pieces; "chars", one token a character; "bytes", one token a byte. A loaded tokenizer has its file's kind.
        vocab_size: entries of the vocabulary, the special tokens and sentinels among them; "bytes" needs no more than
            its own.
        path: the tokenizer is loaded from this file or folder, not trained. What can be read: `llm.tokenization.load`.
        lowercase: wordpiece only: capitals become small letters.
        strip_accents: wordpiece only: combining marks are removed, those that tell Japanese syllables apart among them.
        sentinels: tokens `<extra_id_0>` and so on, in descending order from the highest id (T5, Raffel et al. 2020).
        special_tokens: further special tokens, such as "[MASK]"; text never becomes one of them.
        sample_bytes: training reads about this much text at most.
        chat_template: the Jinja source by which conversations are written, in place of the one in the tokenizer's
            files; "" leaves that one.
    """

    kind: str = "bpe"
    vocab_size: int = 4096
    path: str = ""
    lowercase: bool = False
    strip_accents: bool = False
    sentinels: int = 0
    special_tokens: tuple[str, ...] = ()
    sample_bytes: int = 100_000_000
    chat_template: str = ""

    @property
    def entries(self) -> int:
        """Entries of the vocabulary, at most: a small corpus makes fewer. Reads the file that `path` names."""
        if self.path:
            from llm.tokenization.loading import load

            return load(self).vocab_size
        if self.kind == "bytes":
            return 257 + len(set(self.special_tokens) - {"<|endoftext|>"}) + self.sentinels
        return self.vocab_size

    def __post_init__(self):
        object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        if self.kind not in KINDS:
            raise InputError(f"tokenizer.kind={self.kind!r}: there are {', '.join(map(repr, KINDS))}")
        if self.sentinels < 0:
            raise InputError(f"tokenizer.sentinels={self.sentinels}: 0 or more")
        if self.sample_bytes < 1:
            raise InputError(f"tokenizer.sample_bytes={self.sample_bytes}: at least 1")
        for token in self.special_tokens:
            if not isinstance(token, str) or not token or token != token.strip():
                raise InputError(f"tokenizer.special_tokens: {token!r} is empty or has spaces at an end")
        doubled = {t for t in self.special_tokens if self.special_tokens.count(t) > 1}
        if doubled:
            raise InputError(f"tokenizer.special_tokens names {min(doubled)!r} twice")
        if (self.lowercase or self.strip_accents) and self.kind != "wordpiece" and not self.path:
            raise InputError(
                f"tokenizer.kind={self.kind!r} keeps capitals and accents; only 'wordpiece' can change them"
            )
        least = 8 if self.kind == "wordpiece" else 257
        least += len(self.special_tokens) + self.sentinels
        if not self.path and self.vocab_size < least:
            why = "the special tokens" if self.kind == "wordpiece" else "256 bytes and the special tokens"
            raise InputError(f"tokenizer.vocab_size={self.vocab_size}: at least {least}, {why}")
