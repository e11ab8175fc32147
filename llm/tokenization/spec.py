"""The settings of the tokenizer."""

import dataclasses

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer is trained on the corpus.

    Attributes:
        kind: "bpe", byte-level byte-pair encoding, or "bytes", one token a byte.
        vocab_size: entries of the BPE vocabulary, the 256 bytes and the end-of-text token among them.
    """

    kind: str = "bpe"
    vocab_size: int = 4096

    @property
    def entries(self) -> int:
        """Entries of the vocabulary; a corpus too small for all of its merges makes fewer."""
        return self.vocab_size if self.kind == "bpe" else 257

    def __post_init__(self):
        if self.kind not in ("bpe", "bytes"):
            raise InputError(f"tokenizer.kind={self.kind!r}: there are 'bpe' and 'bytes'")
        if self.vocab_size < 257:
            raise InputError(f"tokenizer.vocab_size={self.vocab_size}: at least 257, 256 bytes and the end of text")
