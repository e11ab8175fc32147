"""Tokenizers behind one interface."""

from llm.tokenization.loading import tokenizer_from
from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.tokenizer import StreamDecoder, Tokenizer
from llm.tokenization.training import train

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerSpec", "tokenizer_from", "train"]
