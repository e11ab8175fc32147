"""How byte-level tokenizers cut text into words before they merge: regular expressions, by their names in files."""

from typing import Any

from llm.tokenization.training import byte_level_step

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# cl100k ends a text's last white space as one word, and breaks a run of white space after its last line end.
CL100K = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++\z"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_ENDING}|{_WORD}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json that cuts by a pattern and writes bytes as characters."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level_step(use_regex=False)]}


def gpt2() -> dict[str, Any]:
    """GPT-2's cut, which the library has built in."""
    return byte_level_step()


def gpt2_single_digits() -> dict[str, Any]:
    """GPT-2's cut after every digit is a word of its own."""
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level_step()]}


# tokenizer.ggml.pre of GGUF files, as llama.cpp reads it: the cut, and whether a word that is an entry needs no merges.
GGUF = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"), (gpt2, False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (gpt2_single_digits, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (lambda: split(_LLAMA3), True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (lambda: split(_QWEN2), False)),
    **dict.fromkeys(("gpt-4o", "llama4"), (lambda: split(O200K), False)),
}
