"""Cleaning: what is done to each document by itself.

    clean          markup, encoding, Unicode, invisible characters, blank space; drops what is left empty or too short
    language       llm/data/language.py
    quality        llm/data/quality.py
    words          a list of words that no document may contain
    personal data  llm/data/personal_data.py

"clean" and "personal data" apply to all fields of an example, the others look at its text alone.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable

from llm.data import language, markup, messages, personal_data, quality
from llm.data.documents import Document, Dropped, Note, Stage
from llm.data.spec import CleanSpec
from llm.data.word_units import APOSTROPHES, UNSPACED, normalised_words
from llm.errors import InputError

_C0 = "\x00-\x08\x0b-\x1f\x7f"  # all but tab and line feed
_BREAKS = "\x0b\x0c\u2028\u2029"  # of lines, paragraphs and pages
# What cannot be seen and shapes nothing: C1, soft hyphens, zero-width spaces, word joiners, byte-order marks and
# noncharacters. They can be parts of mojibake, which is repaired before they go.
_HIDDEN = "\x80-\x9f\xad\u200b\u2060\ufeff\ufdd0-\ufdef\ufffe\uffff"
_CONTROL, _BREAK, _INVISIBLE = (re.compile(f"[{characters}]") for characters in (_C0, _BREAKS, _HIDDEN))
_HIGH = "\U0001fffe-\U0010ffff"  # a range for speed, with the noncharacters of all other planes in it
_PLANES = "".join(chr(plane << 16 | end) for plane in range(1, 17) for end in (0xFFFE, 0xFFFF))
_NONCHARACTER = re.compile(f"[{_PLANES}]")
_UNWANTED = re.compile(f"[{_C0}{_BREAKS}{_HIDDEN}{_HIGH}\u200c\u200d]")  # one pass over texts without any of them
# U+0085 by itself is a line end of other systems; behind another character of Latin-1 it may be half of mojibake.
_NEXT_LINE = re.compile("\x85(?<![\x80-\xff].)")
# Joiners (U+200C, U+200D) shape letters and emoji, one of them behind a character beyond ASCII; others are stray.
_STRAY_JOINER = re.compile(r"[\u200c\u200d](?<![^\x00-\x7f\s\u200c\u200d].)")
_SURROGATES = re.compile("[\ud800-\udfff]")
_PAIRS = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LINE_END = re.compile(r"\n(?<=[^\S\n].)", re.S)  # tells fast whether there are any
# The look behind keeps this linear in long runs of blanks.
_LINE_ENDS = re.compile(r"(?<![^\S\n])[^\S\n]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


def stages(spec: CleanSpec, fields: tuple[str, ...] = ("text",), form: str = messages.TEXT) -> list[tuple[str, Stage]]:
    """The stages that `spec` asks for, named and in order.

    Args:
        spec: the settings.
        fields: what an example is made of: "text", and keys of `document.meta` whose values are texts.
        form: of the documents; of conversations each message is cleaned by itself, and the text is made of them anew.

    Raises:
        InputError: a language that is not known, a list of words that cannot be read.
    """
    change = functools.partial(_each_field, fields=messages.PARTS[form] or fields, form=form)
    found: list[tuple[str, Stage]] = [("clean", functools.partial(_clean, spec=spec, change=change))]
    if spec.languages:
        found.append(("language", language.stage(spec.languages, spec.language_confidence)))
    if spec.quality:
        found.append(("quality", quality.stage(spec.quality)))
    if spec.words:
        found.append(("words", _Words(spec.words)))
    if spec.personal_data:
        found = [(name, functools.partial(_hiding, stage=stage)) for name, stage in found]
        found.append(("personal data", functools.partial(_personal_data, kinds=spec.personal_data, change=change)))
    return found


def _hiding(document: Document, note: Note, stage: Stage) -> Document | Dropped:
    """A stage whose examples show no personal data, which the stage after it has yet to replace."""

    def hidden(reason: str, example: str = "", count: int = 1) -> None:
        note(reason, personal_data.hidden(example), count)

    result = stage(document, hidden)
    return Dropped(result.reason, personal_data.hidden(result.detail)) if isinstance(result, Dropped) else result


def _each_field(
    document: Document, note: Note, change: Callable[[str, Note], str], fields: Iterable[str], form: str
) -> Document | Dropped:
    """The document with `change(text, note)` in place of each field's text; fields are noted together.

    A document of which a field, or a message of one, is left empty is dropped.
    """
    noted: dict[str, list] = {}

    def gather(reason: str, example: str = "", count: int = 1) -> None:
        noted.setdefault(reason, [example, 0])[1] += count

    text, meta = document.text, document.meta
    for name in fields:
        if name == "text":
            text = change(text, gather)
            if not text:
                return Dropped("empty")
            continue
        value = meta.get(name)
        if form != messages.TEXT and isinstance(value, list):
            value = [{**message, "content": change(message["content"], gather)} for message in value]
        elif isinstance(value, str):
            value = change(value, gather)
        else:
            raise InputError(f"{meta.get('source', document.id)}: the field {name!r} is {value!r}, not a text")
        if not all(messages.contents(value)):
            return Dropped("empty", f"the field {name!r}")
        meta = {**meta, name: value}
    if form != messages.TEXT:
        text = messages.transcript(meta, form)
    for reason, (example, count) in noted.items():
        note(reason, example, count)
    return Document(document.id, text, meta)


# --- clean ------------------------------------------------------------------------------------------------------------


Change = Callable[[Document, Note, Callable[[str, Note], str]], Document | Dropped]  # `_each_field` of some fields


def _clean(document: Document, note: Note, spec: CleanSpec, change: Change) -> Document | Dropped:
    """One form of Unicode, line feeds as line ends, no control and invisible characters, no blank space at line ends,
    at most one blank line, and one line feed at the end of the text (other fields have none). Cleaning twice changes
    nothing.
    """
    if spec.markup and (document.meta.get("format") == "html" or markup.is_html(document.text)):
        text = markup.main_text(document.text)
        note("markup removed", f"{len(document.text)} characters -> {len(text)}")
        document = Document(document.id, text, {**document.meta, "format": "text"})
    cleaned = change(document, note, lambda text, gather: clean_text(text, spec, gather))
    if isinstance(cleaned, Dropped):
        return cleaned
    if len(cleaned.text) < spec.min_characters:
        return Dropped("too short", cleaned.text)
    return Document(cleaned.id, cleaned.text + "\n", cleaned.meta)


def clean_text(text: str, spec: CleanSpec = CleanSpec(), note: Note = lambda *_: None) -> str:
    """A text in clean form, as `stages` says, without a line feed at its end; `note` hears what was wrong with it."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return _space(_CONTROL.sub("", text.replace("\x0b", "\n").replace("\x0c", "\n")))
    if _SURROGATES.search(text):
        text = _without_surrogates(text, note)
    repaired: list[tuple[str, str]] = []
    text = _space(text)
    # Taking a character out, or composing two, can make mojibake of its neighbours: until nothing changes.
    while True:
        before = text
        if _UNWANTED.search(text):
            text = _CONTROL.sub("", _BREAK.sub("\n", _NEXT_LINE.sub("\n", text)))
        if spec.repair:
            text = _repair(text, repaired)
        if spec.normalization != "as_is":
            text = unicodedata.normalize(spec.normalization, text)  # pyright: ignore[reportArgumentType]
        if _UNWANTED.search(text):
            text = _NONCHARACTER.sub("", _INVISIBLE.sub("", text.replace("\x85", "\n")))
            text = _STRAY_JOINER.sub("", text)
        text = _space(text)
        if text == before:
            break
    if repaired:
        note("mojibake repaired", _difference(*repaired[0]), len(repaired))
    return text


def _space(text: str) -> str:
    if _LINE_END.search(text):
        text = _LINE_ENDS.sub("\n", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _without_surrogates(text: str, note: Note) -> str:
    text, pairs = _PAIRS.subn(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
    if pairs:
        note("surrogate pairs joined", "", pairs)
    lone = _SURROGATES.search(text)
    if not lone:
        return text
    shown = f"U+{ord(lone[0]):04X} at character {lone.start()}"
    text, count = _SURROGATES.subn("", text)
    note("lone surrogates removed", shown, count)
    return text


@functools.cache
def _ftfy():
    import ftfy
    from ftfy.badness import badness, is_bad

    # Only what can be decoded without a doubt: where a byte was lost, nothing is put in its place.
    config = ftfy.TextFixerConfig(replace_lossy_sequences=False, explain=False)
    return badness, is_bad, functools.partial(ftfy.fix_encoding, config=config)


def _repair(text: str, repaired: list[tuple[str, str]]) -> str:
    """Undoes mojibake line by line; appends (before, after) of each line that was repaired.

    A repair that leaves more than half of the unlikely sequences of characters has guessed the wrong encoding (it
    meets Shift-JIS read as Windows-1252), and the line stays as it was.
    """
    badness, is_bad, fix = _ftfy()
    if not is_bad(text):
        return text
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.isascii() or not is_bad(line):
            continue
        fixed = fix(line)
        if fixed != line and 2 * badness(fixed) <= badness(line):
            lines[number] = fixed
            repaired.append((line, fixed))
    return "\n".join(lines)


def _difference(before: str, after: str, around: int = 15, width: int = 60) -> str:
    """The place where two texts begin to differ: "... before ... -> ... after ..."."""
    start = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    start = max(0, start - around)
    return f"{before[start : start + width]} -> {after[start : start + width]}"


# --- words ------------------------------------------------------------------------------------------------------------


_APOSTROPHE = re.compile(f"[{APOSTROPHES}]")


class _Words:
    """The stage that drops documents with a word of a list.

    Case and punctuation do not count. Words stand whole, or with an apostrophe beside them ("word's"), and several in
    a line one after another; one that has a character of a script without spaces is looked for anywhere in the text.
    """

    def __init__(self, path: str):
        try:
            with open(path, encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file]
        except UnicodeDecodeError as error:
            raise InputError(f"clean.words={path}: not UTF-8 at byte {error.start}; convert the file") from None
        entries = [" ".join(normalised_words(line)) for line in lines if line]
        if "" in entries or not entries:
            what = f"{lines[entries.index('')]!r} has no word in it" if entries else "no word in the file"
            raise InputError(f"clean.words={path}: {what}; write one word a line")
        unit = re.compile(f"[{UNSPACED}]")
        self._single = frozenset(e for e in entries if " " not in e)
        # Of several units: with spaces around, so that words are whole; without where the script has none.
        self._several = [(f" {e} ", e) for e in entries if " " in e and not unit.search(e)]
        self._inside = [(e.replace(" ", ""), e) for e in entries if " " in e and unit.search(e)]

    def __call__(self, document: Document, note: Note) -> Document | Dropped:
        found = self.find(document.text)
        return Dropped("words", found) if found else document

    def find(self, text: str) -> str:
        """The first of the words that a text contains, in the order of the alphabet; "" when there is none."""
        words = normalised_words(text)
        divided, apostrophes = _APOSTROPHE.subn(" ", text)
        if apostrophes:
            words = [*words, "\n", *normalised_words(divided)]  # lest the first words follow the last
        hits = sorted(self._single.intersection(words))
        if not hits and self._several:
            joined = f" {' '.join(words)} "
            hits = sorted(entry for searched, entry in self._several if searched in joined)
        if not hits and self._inside:
            joined = "".join(words)
            hits = sorted(entry for searched, entry in self._inside if searched in joined)
        return hits[0] if hits else ""


# --- personal data ----------------------------------------------------------------------------------------------------


def _personal_data(document: Document, note: Note, kinds: tuple[str, ...], change: Change) -> Document | Dropped:
    return change(document, note, lambda text, gather: personal_data.replace(text, kinds, gather))
