"""The settings of the tokenizer."""

import dataclasses

from llm.errors import InputError

KINDS = ("bpe", "wordpiece", "unigram", "bytes", "chars")
END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer is trained on the corpus, or loaded.

    Attributes:
        kind: what is trained. "bpe", byte-level byte-pair encoding; "wordpiece", BERT's; "unigram", a unigram model with
            bytes for characters it does not know; "chars", one token a character, the rare ones in bytes; "bytes", one
            token a byte. All but "wordpiece" are lossless.
        vocab_size: entries of the vocabulary, special tokens and sentinels among them; "bytes" does not ask.
        path: a tokenizer to load in place of training: a file, or a folder of such files. "" trains.
        lowercase: "wordpiece", and a vocab.txt without a tokenizer_config.json, lower the case of the text.
        strip_accents: the same two take accents away. In Japanese this makes one letter of ba and ha.
        special_tokens: further special tokens, such as "[MASK]"; a "wordpiece" has its five of BERT, the other kinds the
            end of text alone.
        sentinels: T5's sentinel tokens, at the top of the vocabulary; <extra_id_0> has the highest id.
        pattern: how .tiktoken ranks split text: "r50k_base", "p50k_base", "cl100k_base", "o200k_base" or a regular
            expression. "" goes by the file's name.
    """

    kind: str = "bpe"
    vocab_size: int = 4096
    path: str = ""
    lowercase: bool = False
    strip_accents: bool = False
    special_tokens: tuple[str, ...] = ()
    sentinels: int = 0
    pattern: str = ""

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens of a trained tokenizer, the sentinels left out."""
        own = BERT_TOKENS if self.kind == "wordpiece" else (END_OF_TEXT,)
        return own + tuple(token for token in self.special_tokens if token not in own)

    @property
    def entries(self) -> int:
        """Entries of the vocabulary: as many as the file at `path` has; trained on a small corpus it may be fewer.

        Raises:
            InputError: the file at `path` cannot be read.
        """
        if self.path:
            from llm.tokenization.loading import tokenizer_from  # reads the file

            return tokenizer_from(self.path, self).vocab_size
        return 256 + len(self.specials) + self.sentinels if self.kind == "bytes" else self.vocab_size

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"tokenizer.kind={self.kind!r}: there are {', '.join(map(repr, KINDS))}")
        if (self.lowercase or self.strip_accents) and self.kind != "wordpiece" and not self.path:
            raise InputError(
                f"tokenizer.lowercase and tokenizer.strip_accents are for kind 'wordpiece'; {self.kind!r} keeps the text"
            )
        if self.sentinels < 0:
            raise InputError(f"tokenizer.sentinels={self.sentinels}: 0, or a number of tokens")
        for token in self.special_tokens:
            if len(token) < 2 or token != token.strip() or self.special_tokens.count(token) > 1:
                raise InputError(
                    f"tokenizer.special_tokens={self.special_tokens}: each once, of two characters or more, without "
                    f"spaces at its ends; {token!r} is not"
                )
        if self.pattern and not self.path:
            raise InputError("tokenizer.pattern is for a .tiktoken file: name it in tokenizer.path")
        # An alphabet of one character needs two entries of a WordPiece vocabulary: "a" and "##a".
        base, what = (2, "a character") if self.kind == "wordpiece" else (256, "256 bytes")
        if self.kind == "unigram":
            base, what = 256 + 2, "256 bytes, the unknown, a space"
        ends = "the end of text" if self.specials == (END_OF_TEXT,) else f"{len(self.specials)} special tokens"
        least = base + len(self.specials) + self.sentinels
        if not self.path and self.kind != "bytes" and self.vocab_size < least:
            sentinels = f", {self.sentinels} sentinels" if self.sentinels else ""
            raise InputError(f"tokenizer.vocab_size={self.vocab_size}: at least {least}, {what} and {ends}{sentinels}")
