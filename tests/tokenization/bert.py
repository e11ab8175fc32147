"""BERT's tokenizer in plain Python (Devlin et al. 2019, section 3), the reference for the tests."""

import unicodedata

CHINESE = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]  # fmt: skip


def _punctuation(c: str) -> bool:
    ascii_symbol = ord(c) < 128 and c.isprintable() and not c.isalnum() and c != " "
    return ascii_symbol or unicodedata.category(c)[0] == "P"


def words(text: str, lowercase: bool, strip_accents: bool) -> list[str]:
    """Cleaned, cut at white space, Chinese characters and punctuation."""
    kept = []
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) == "Zs":
            kept.append(" ")
        elif c in "\0\ufffd" or unicodedata.category(c)[0] == "C":
            continue
        elif any(low <= ord(c) <= high for low, high in CHINESE):
            kept += [" ", c, " "]
        else:
            kept.append(c)
    found = []
    for word in "".join(kept).split():
        if lowercase:
            word = word.lower()
        if strip_accents:
            word = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        part = ""
        for c in word:
            if _punctuation(c):
                found += [part, c]
                part = ""
            else:
                part += c
        found.append(part)
    return [word for word in found if word]


def encode(text: str, vocab: dict[str, int], lowercase: bool, strip_accents: bool) -> list[int]:
    """The longest entry first, from the left; a word that does not come out is [UNK]."""
    ids = []
    for word in words(text, lowercase, strip_accents):
        pieces, start = [], 0
        while start < len(word) <= 100:
            end = next((e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in vocab), 0)
            if not end:
                break
            pieces.append(vocab[("##" if start else "") + word[start:end]])
            start = end
        ids += pieces if start == len(word) else [vocab["[UNK]"]]
    return ids
