"""Published quality rules, through datatrove's filters: Gopher (Rae et al. 2021, quality and repetition), C4 (Raffel et
al. 2020) and FineWeb (Penedo et al. 2024).

The numbers are the published ones. What they say about words goes by `llm.data.word_units.words`: blank space divides
words, and each character of a script without spaces is one. Texts of which more than half are such characters
(Chinese, Japanese, Thai, ...) are held against the same numbers but for these:

    gopher_quality     no least mean length of words: a character is a word here
    gopher_repetition  n-grams of 3n/2 characters for those of n words: a Chinese word has about one and a half
    fineweb            a short line has at most 10 characters, not 30

English stop words are asked of English texts alone; other languages have no such rule. C4 counts the full-width marks
as the ends of sentences that they are, closing quotes included, curly ones too.
"""

import collections
import functools
import re

from llm.data import language
from llm.data.documents import Document, Dropped, Note, Stage
from llm.data.word_units import UNSPACED, unspaced, words

_SENTENCE = re.compile(r"[^.!?。！？｡]*(?:[.!?](?=\s|[\"'”’)\]]|$)|[。！？｡]|[.!?]|$)")
_UNIT = re.compile(f"([{UNSPACED}])")
# The marks that end a sentence, as C4 writes them.
_MARKS = str.maketrans("。！？｡“”‘’「」『』", ".!?.\"\"''\"\"\"\"")


def sentences(text: str) -> list[str]:
    """The sentences of a text: up to . ! ? before blank space, and up to 。！？ anywhere."""
    return [s for s in (piece.strip() for piece in _ENDS.split(text)) if s]


_ENDS = re.compile(r"(?<=[.!?][\"'”’)\]])\s+|(?<=[.!?])\s+|(?<=[。！？｡])(?![”’」』）])|(?<=[。！？｡][”’」』）])|\n+")


@functools.cache
def _filters() -> dict:
    """rule -> (filter for scripts with spaces, filter for those without)."""
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text):
            return words(text)

        def sent_tokenize(self, text):
            return sentences(text)

        def span_tokenize(self, text):
            raise NotImplementedError("no rule asks for spans")

    class C4(C4QualityFilter):
        lines: collections.Counter

        def stat_update(self, *labels, value=1, unit=None):
            for label in labels:
                self.lines[label] += value

    def gopher(**settings):
        return GopherQualityFilter(language=tokenizer, **settings)  # pyright: ignore[reportArgumentType]

    tokenizer = Words()
    plain = {"language": tokenizer}
    top = ((3, 0.2), (4, 0.18), (6, 0.16))
    repeated = ((8, 0.15), (9, 0.14), (10, 0.13), (12, 0.12), (14, 0.11), (15, 0.10))
    c4 = C4(**plain)
    return {
        "gopher_quality": (gopher(min_stop_words=None), gopher(min_stop_words=None, min_avg_word_length=None)),
        "gopher_quality en": (gopher(), gopher(min_stop_words=None, min_avg_word_length=None)),
        "gopher_repetition": (
            GopherRepetitionFilter(**plain),
            GopherRepetitionFilter(top_n_grams=top, dup_n_grams=repeated, **plain),
        ),
        "c4": (c4, c4),
        "fineweb": (FineWebQualityFilter(**plain), FineWebQualityFilter(short_line_length=10, **plain)),
    }
