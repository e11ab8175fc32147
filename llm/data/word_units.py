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

# The forms in which an apostrophe is typed: "\u02bc" is a letter to Unicode, "`" and "\u00b4" stand in for it.
APOSTROPHES = "'`\u00b4\u02bc\u2018\u2019"

# One pass over ASCII: letters to lower case, apostrophes out, everything else but digits to a space.
_ASCII = str.maketrans(
    {i: None if chr(i) in APOSTROPHES else chr(i).lower() if chr(i).isalnum() else " " for i in range(128)}
)

_UNIT = re.compile(f"[{UNSPACED}]")
_WORDS = re.compile(rf"[{UNSPACED}][^\s\w]*|[^\s{UNSPACED}]+")


# A half-width voicing mark and its letter: to be composed before units are set apart.
_HALF_MARK = re.compile("[\uff9e\uff9f]")
_VOICED = re.compile(".[\uff9e\uff9f]", re.S)


class _Folded(dict):
    """Code point -> what stands for it: its plain form (NFKC), casefolded, with spaces around a unit; a space for what
    divides words; nothing for what cannot be seen.
    """

    def __missing__(self, code: int) -> str:
        self[code] = found = self._fold(chr(code))
        return found

    def _fold(self, character: str) -> str:
        kind, plain = unicodedata.category(character), unicodedata.normalize("NFKC", character)
        if character in APOSTROPHES or _invisible(ord(character), kind):
            return ""
        if plain != character:
            # Letters and digits in other forms are theirs, one or several; of signs, those of one letter.
            several = len(plain) > 1 and kind[0] not in "LMN"
            return " " if several else "".join(self[ord(c)] for c in plain)
        if kind[0] not in "LMN":
            return " "
        return f" {character} " if kind != "Nd" and _UNIT.match(character) else character.casefold()


def _invisible(code: int, kind: str) -> bool:
    selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF  # they choose among shapes of one character
    noncharacter = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return selector or noncharacter or (kind == "Cf" and not 0x0600 <= code < 0x0900)  # the signs of Arabic are seen


_FOLDED = _Folded()


def normalised_words(text: str) -> list[str]:
    """The words of a text, casefolded, in NFKC, without punctuation; a character of a script without spaces is one.

    Letters, marks and digits make words. Apostrophes and characters that cannot be seen (soft hyphens, joiners,
    variation selectors) are left out, and everything else divides: "Don't" is "dont", "co-op" is "co", "op".
    """
    if text.isascii():
        return text.translate(_ASCII).split()
    if _HALF_MARK.search(text):
        text = _VOICED.sub(lambda pair: unicodedata.normalize("NFKC", pair[0]), text)
    text = unicodedata.normalize("NFC", text)
    return unicodedata.normalize("NFC", text.translate(_FOLDED)).split()


def words(text: str) -> list[str]:
    """The words of a text as rules count them: divided by blank space, with their case and punctuation.

    A character of a script without spaces is one word, with the punctuation that follows it.
    """
    return text.split() if text.isascii() else _WORDS.findall(text)


def unspaced(text: str) -> bool:
    """Whether more than half of the words are characters of scripts without spaces."""
    return not text.isascii() and 2 * len(_UNIT.findall(text)) > len(_WORDS.findall(text))
