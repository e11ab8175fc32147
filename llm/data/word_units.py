"""Words, in scripts that write spaces between them and in scripts that do not.

A word is a run of letters, marks and digits, after the word boundaries of Unicode (UAX #29) but simpler: an apostrophe
or a point between two letters, and a point or a comma between two digits, belong to the word. Scripts that write no
spaces (Han, Kana, Bopomofo, Thai, Lao, Khmer, Myanmar) have no such runs; there each character, with the marks on it,
is a unit of its own, and `UNITS_PER_WORD` says how many of them make a word where words are counted.
"""

import functools
import re
import unicodedata

# Characters of scripts without spaces, by how many make a word; their digits and punctuation are left out.
_EAST_ASIAN = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"
)
_SOUTH_EAST_ASIAN = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"
    "\u1000-\u103f\u1050-\u108f\u109a-\u109f\ua9e0-\ua9ef\uaa60-\uaa7f\u1780-\u17d3\u17d7\u17dc\u17dd"
)
# Marks that follow a letter in those scripts: kana's sound marks, the ideographs' variation selectors, Thai vowels ...
_UNIT_MARKS = (
    "\u0300-\u036f\u3099\u309a\ufe00-\ufe0f\U000e0100-\U000e01ef\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
    "\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d"
    "\u108f\u109a-\u109d\uaa7b-\uaa7d\u17b4-\u17d3\u17dd"
)
# Beyond the basic plane whole blocks are taken: letters and marks of historic and small scripts, mathematical letters.
_FAR_LETTERS = "\U00010280-\U0001cfff\U0001d400-\U0001d7ff\U0001e000-\U0001efff"

# Units in a word. Han: the segmented People's Daily of January 1998 has 1,606,385 ideographs in 936,231 words, 1.72;
# Japanese is taken as like it. Thai and its neighbours: about three syllable-like units, our own rough figure.
UNITS_PER_WORD = {"": 1.0, "east_asian": 1.7, "south_east_asian": 3.0}

_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:(?:(?<=[A-Za-z])['.](?=[A-Za-z])|(?<=[0-9])[.,'](?=[0-9]))[A-Za-z0-9]+)*")
_ASCII_PLAIN = re.compile(r"[a-z0-9]+")
_IGNORED = {ord(c): None for c in "'\u2019\u02bc\uff07\u00ad\u200b\u200c\u200d\u2060\ufeff"}
_EAST, _SOUTH_EAST = re.compile(f"[{_EAST_ASIAN}]"), re.compile(f"[{_SOUTH_EAST_ASIAN}]")
UNSPACED = re.compile(f"[{_EAST_ASIAN}{_SOUTH_EAST_ASIAN}]")
UNIT = f"(?:[{_EAST_ASIAN}{_SOUTH_EAST_ASIAN}][{_UNIT_MARKS}]*)"


@functools.cache
def _letters() -> str:
    """The inside of a character class: letters, marks and digits of scripts that write spaces."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        character = chr(code)
        if (character.isalnum() or unicodedata.category(character)[0] == "M") and not UNSPACED.match(character):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges) + _FAR_LETTERS


@functools.cache
def _word() -> re.Pattern:
    letter = f"[{_letters()}]"
    joined = rf"(?:(?<=[^\W\d_])['’.·](?=[^\W\d_{_EAST_ASIAN}{_SOUTH_EAST_ASIAN}])|(?<=\d)[.,'’](?=\d)){letter}+"
    return re.compile(rf"{letter}+(?:{joined})*|{UNIT}")


@functools.cache
def _plain() -> re.Pattern:
    return re.compile(rf"[{_letters()}]+|{UNIT}")


def words(text: str) -> list[str]:
    """The words of a text in order, as written: "Don't pay 3.50" gives Don't, pay, 3.50; "你好 ok" gives 你, 好, ok."""
    return _ASCII_WORD.findall(text) if text.isascii() else _word().findall(text)


def normalised_words(text: str) -> list[str]:
    """Words to compare texts by: compatibility forms (NFKC), case folded, no punctuation, no invisible characters.

    Apostrophes vanish ("don't" is "dont"), every other punctuation mark divides ("3.50" is "3", "50").
    """
    if text.isascii():
        return _ASCII_PLAIN.findall(text.lower().replace("'", ""))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _plain().findall(folded.translate(_IGNORED))


def script(text: str, share: float = 0.1) -> str:
    """The key of `UNITS_PER_WORD` that a text is measured by.

    That is the script without spaces to which the most units belong, if at least `share` of all its words do; else "".
    """
    if text.isascii():
        return ""
    east, south_east = len(_EAST.findall(text)), len(_SOUTH_EAST.findall(text))
    most = max(east, south_east)
    if not most or most < share * len(words(text)):
        return ""
    return "east_asian" if east >= south_east else "south_east_asian"
