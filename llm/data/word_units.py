"""Words, in scripts with and without spaces between them.

Han, Kana, Thai, Lao, Khmer and Myanmar are written without spaces, and dividing them needs a dictionary. Here each of
their characters, with the marks on it, is one unit. Rules that count words thereby see texts in these scripts as long
as they are, and n-grams of them are n-grams of characters.
"""

import functools
import unicodedata

# The marks of prolonged sounds and of repetition stand with the Kana, though Unicode gives them to several scripts.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED_LETTER = rf"[[{UNSPACED}]&&[\p{{L}}\p{{Nl}}\p{{No}}\p{{So}}]]\p{{M}}*"

# One pass over ASCII: letters to lower case, everything else but digits to a space.
_ASCII = str.maketrans({i: chr(i).lower() if chr(i).isalnum() else " " for i in range(128)})


@functools.cache
def _patterns():
    import regex

    words = rf"{_UNSPACED_LETTER}|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+|[[{UNSPACED}]&&\p{{N}}]"
    attached = rf"[{UNSPACED}]\p{{M}}*[^\s\w]*|[^\s{UNSPACED}]+"
    flags = regex.VERSION1
    return regex.compile(words, flags), regex.compile(attached, flags), regex.compile(rf"[{UNSPACED}]", flags)


def normalised_words(text: str) -> list[str]:
    """The words of a text, casefolded, in NFC, without punctuation; a character of a script without spaces is one.

    Letters, marks and digits make words and everything else divides them: "Don't" is "don", "t".
    """
    if text.isascii():
        return text.translate(_ASCII).split()
    return _patterns()[0].findall(unicodedata.normalize("NFC", text.casefold()))


def words(text: str) -> list[str]:
    """The words of a text as rules count them, divided by blank space, with case and punctuation.

    A character of a script without spaces is one word, with the punctuation that follows it.
    """
    return text.split() if text.isascii() else _patterns()[1].findall(text)


def unspaced_share(text: str) -> float:
    """Which share of the words are characters of scripts without spaces; 0 of a text without words."""
    if text.isascii():
        return 0.0
    count = len(words(text))
    return len(_patterns()[2].findall(text)) / count if count else 0.0
