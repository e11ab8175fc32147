"""Published quality rules, through datatrove's filters: Gopher (Rae et al. 2021, quality and repetition), C4 (Raffel et
al. 2020) and FineWeb (Penedo et al. 2024).

The numbers are the published ones. What they say about words goes by `llm.data.word_units.words`: blank space divides
words, and each character of a script without spaces is one. Texts of which more than half are such characters
(Chinese, Japanese, Thai, ...) have no least mean length of words in gopher_quality, and in fineweb a short line has at
most 10 characters instead of 30.

English stop words are asked of English texts alone; other languages have no such rule. For c4 the full-width marks
。！？ end sentences like . ! ?, and curly or corner quotes close them like straight ones.
"""

import functools
import re

from llm.data import language
from llm.data.documents import Document, Dropped, Note, Stage
from llm.data.word_units import UNSPACED, unspaced, words

SHORT_LINE = 10  # characters, in scripts without spaces

_UNIT = re.compile(f"([{UNSPACED}])")
_MARKS = str.maketrans(
    {**dict.fromkeys("。｡", ". "), "！": "! ", "？": "? ", "…": "..."}
    | dict.fromkeys("“”「」『』", '"') | dict.fromkeys("‘’", "'")
)  # fmt: skip
# Behind . ! ? (and a closing quote) before blank space, but not behind an initial, "J. Austen"; behind 。！？ anywhere.
_ENDS = re.compile(r"(?<=[.!?])(?<![\s(][A-Z]\.)\s+|(?<=[.!?][\"'”’)\]])\s+|(?<=[。！？｡])")


def sentences(text: str) -> list[str]:
    """The sentences of a text. Abbreviations end one: rules that count sentences want a few, not all of them right."""
    return [piece.strip() for piece in _ENDS.split(text) if any(c.isalnum() for c in piece)]


@functools.cache
def _filters() -> dict:
    """rule -> (filter for scripts with spaces, filter for those without)."""
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

    class Words(WordTokenizer):
        def word_tokenize(self, text):
            return words(text)

        def sent_tokenize(self, text):
            return sentences(text)

        def span_tokenize(self, text):
            return list(simple_span_tokenize(text, sentences(text)))

    class C4(C4QualityFilter):
        verdicts: list[str]  # on each line, in order

        def stat_update(self, *labels, value=1, unit=None):
            self.verdicts += [label for label in labels if label != "line-total"]

    tokenizer: dict = {"language": Words()}
    lenient = GopherQualityFilter(min_stop_words=None, min_avg_word_length=None, **tokenizer)
    repetition, c4 = GopherRepetitionFilter(**tokenizer), C4(**tokenizer)
    return {
        "gopher_quality": (GopherQualityFilter(min_stop_words=None, **tokenizer), lenient),
        "gopher_quality, English": (GopherQualityFilter(**tokenizer), lenient),
        "gopher_repetition": (repetition, repetition),
        "c4": (c4, c4),
        "fineweb": (FineWebQualityFilter(**tokenizer), FineWebQualityFilter(short_line_length=SHORT_LINE, **tokenizer)),
    }


def stage(rules: tuple[str, ...]) -> Stage:
    """The stage that drops what a rule refuses, by reasons like "gopher_quality: gopher_short_doc".

    The rule c4 also takes out lines: of other than whole sentences, of under three words, of script or policy notices.
    """
    return functools.partial(_stage, rules=rules)


def _stage(document: Document, note: Note, rules: tuple[str, ...]) -> Document | Dropped:
    from datatrove.data import Document as Seen

    text, kind = document.text, int(unspaced(document.text))
    for rule in rules:
        if rule == "c4":
            text, reason = _c4(text, note)
        else:
            name = rule
            if rule == "gopher_quality" and not kind and language.identify(text)[0] == "en":
                name = "gopher_quality, English"
            result = _filters()[name][kind].filter(Seen(text=text, id=document.id))
            reason = "" if result is True else result[1]
        if reason:
            return Dropped(f"{rule}: {reason}", document.text.strip())
    return Document(document.id, text, document.meta)


def _c4(text: str, note: Note) -> tuple[str, str]:
    """(the text with the lines that C4 keeps, ""), or (text, the reason to drop it)."""
    from datatrove.data import Document as Seen
    from datatrove.pipeline.filters.c4_filters import CITATION_REGEX

    c4 = _filters()["c4"][0]
    c4.verdicts = []
    lines = text.splitlines()
    # The filter divides words by spaces and knows ASCII marks; it sees each line in that form.
    forms = lines if text.isascii() else [_UNIT.sub(r" \1 ", line).translate(_MARKS) for line in lines]
    result = c4.filter(Seen(text="".join(f"{form}\n" for form in forms), id=""))
    if result is not True:
        return text, result[1]
    kept: list[str] = []
    removed: dict[str, list[str]] = {}
    for line, verdict in zip(lines, c4.verdicts, strict=True):
        if verdict == "line-kept":
            kept.append(CITATION_REGEX.sub("", line.strip()).strip())
        elif line.strip():
            removed.setdefault(verdict.removeprefix("line-filter-"), []).append(line)
        elif kept and kept[-1]:
            kept.append("")  # paragraphs stay apart
    for reason, gone in removed.items():
        note(f"c4: line removed, {reason}", gone[0], len(gone))
    return "\n".join(kept).strip() + "\n", ""
