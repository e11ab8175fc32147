"""Tokenizers behind one interface."""

from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.tokenizer import StreamDecoder, Tokenizer, train

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerSpec", "train"]
