"""Words, in scripts with and without spaces between them.

Han, Kana, Bopomofo, Thai, Lao, Khmer and Myanmar are written without spaces, and dividing them needs a dictionary.
Here each of their characters is one unit: rules that count words see texts in these scripts as long as they are, and
n-grams of them are n-grams of characters.
"""

import re
import unicodedata

# First and last character of the blocks whose letters and marks are units (digits make words as they do elsewhere).
_BLOCKS = (
    ("\u0e01", "\u0eff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"), ("\u2e80", "\u2fdf"), ("\u3005", "\u3007"),
    ("\u3021", "\u3029"), ("\u3031", "\u3035"), ("\u3038", "\u303c"), ("\u3041", "\u312f"), ("\u31a0", "\u31bf"),
    ("\u31f0", "\u31ff"), ("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\ua9e0", "\ua9ff"), ("\uaa60", "\uaa7f"),
    ("\uf900", "\ufaff"), ("\uff66", "\uff9f"), ("\U0001aff0", "\U0001b16f"), ("\U00020000", "\U0003ffff"),
)  # fmt: skip
UNSPACED = "".join(f"{first}-{last}" for first, last in _BLOCKS)  # the inside of a character class of re

# One pass over ASCII: letters to lower case, everything else but digits to a space.
_ASCII = str.maketrans({i: chr(i).lower() if chr(i).isalnum() else " " for i in range(128)})

_UNIT = re.compile(f"[{UNSPACED}]")
_WORDS = re.compile(rf"[{UNSPACED}][^\s\w]*|[^\s{UNSPACED}]+")


class _Folded(dict):
    """Code point -> what stands for it: its casefold, with spaces around a unit; a space for what divides words."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        if 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
            found = ""  # variation selectors choose among shapes of one character
        elif kind[0] not in "LMN":
            found = " "
        elif kind != "Nd" and _UNIT.match(character):
            found = f" {character} "
        else:
            found = character.casefold()
        self[code] = found
        return found


_FOLDED = _Folded()


def normalised_words(text: str) -> list[str]:
    """The words of a text, casefolded, in NFC, without punctuation; a character of a script without spaces is one.

    Letters, marks and digits make words and everything else divides them: "Don't" is "don", "t".
    """
    if text.isascii():
        return text.translate(_ASCII).split()
    return unicodedata.normalize("NFC", text).translate(_FOLDED).split()


def words(text: str) -> list[str]:
    """The words of a text as rules count them: divided by blank space, with their case and punctuation.

    A character of a script without spaces is one word, with the punctuation that follows it.
    """
    return text.split() if text.isascii() else _WORDS.findall(text)


def unspaced(text: str) -> bool:
    """Whether more than half of the words are characters of scripts without spaces."""
    return not text.isascii() and 2 * len(_UNIT.findall(text)) > len(_WORDS.findall(text))
