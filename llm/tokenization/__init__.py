"""Tokenizers behind one interface."""

from llm.tokenization.loading import load, tokenizer_from
from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.tokenizer import StreamDecoder, Tokenizer
from llm.tokenization.training import train

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerSpec", "load", "tokenizer_from", "train"]
