"""Questions without an annotator: a name is left out of a sentence and stands in the text before it.

After the children's book test (Hill et al. 2015): what is asked can be answered by reading, and any text with names
gives thousands of questions, each with its answer's place. The names are dealt out anew for each question (Hermann et
al. 2015), so that nothing that is known of them helps.
"""

import collections
import lzma
import pathlib
import random
import re
from collections.abc import Iterator

from llm.data.packages import Part

BLANK = "_"  # stands in a question for the name
NAMES = [f"N{number}" for number in range(10, 60)]  # what stands for the others, all of one length
HELD_OUT = "persuasion"
CONTEXT_WORDS = 80  # of the text before the sentence, at most, in whole sentences
QUESTION_WORDS = range(5, 61)
SEEN = 10  # a word is a name if it stands so often inside sentences with a capital, and nine times of ten with one

_TITLES = ("Admiral", "Captain", "Colonel", "Dr", "Lady", "Lord", "Miss", "Mr", "Mrs", "Sir")
_SHORT = "".join(rf"(?<!\b{word}\.)" for word in ("Mr", "Mrs", "Dr", "St", "Esq", "Hon"))
_SENTENCE_END = re.compile(rf"(?:{_SHORT}(?<=[.!?])|(?<=[.!?]\"))\s+(?=[\"A-Z])")


def novels(folder: pathlib.Path) -> Iterator[Part]:
    """(part, record) of every question to the embedded novels: part "test" asks about the held-out one.

    Records have id, source, question, text and answer, {"text", "start"}.
    """
    for path in sorted(folder.glob("*.txt.xz")):
        name = path.name.removesuffix(".txt.xz")
        for number, record in enumerate(questions(lzma.decompress(path.read_bytes()).decode("utf-8"))):
            yield "test" if name == HELD_OUT else "train", {"id": f"{name}:{number}", "source": name, **record}


def questions(text: str) -> Iterator[dict]:
    """question, text and answer, {"text", "start"}: one for every name in a sentence that the text before it has too.

    At least two different names stand in the text before. The answer's place, in characters, is where it stands last.
    """
    text = text.replace(BLANK, "")  # which novels _emphasise_ by
    mention = mentions(text)
    if mention is None:
        return
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    sentences = [sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph)]
    for number, sentence in enumerate(sentences):
        if len(sentence.split()) not in QUESTION_WORDS:
            continue
        first, words = number, 0
        while first > 0 and (words := words + len(sentences[first - 1].split())) <= CONTEXT_WORDS:
            first -= 1
        context = " ".join(sentences[first:number])
        known = {found[0] for found in mention.finditer(context)}
        if len(known) < 2:
            continue
        named = {found[0] for found in mention.finditer(sentence)}
        everyone = sorted(named | known)
        for place, asked in enumerate(sorted(named & known)):
            dealt = dict(zip(everyone, random.Random(f"{number} {place}").sample(NAMES, len(everyone))))
            hidden, question = (mention.sub(lambda f, d=dealt: d[f[0]], part) for part in (context, sentence))
            answer = dealt[asked]
            yield {
                "question": question.replace(answer, BLANK),
                "text": hidden,
                "answer": {"text": answer, "start": hidden.rindex(answer)},
            }


def mentions(text: str) -> re.Pattern[str] | None:
    """What matches the names of a text, with their titles: "Mr. Darcy", "Lady Russell". None where it has none."""
    text = " ".join(text.split())
    before = r"(?:(?<=[a-z,;] )|(?<=Mr\. )|(?<=Mrs\. )|(?<=Dr\. ))"
    inside = collections.Counter(re.findall(before + r"[A-Z][a-z]{2,}\b", text))
    small = collections.Counter(re.findall(r"\b[a-z]{3,}\b", text))
    names = [w for w, n in inside.items() if n >= SEEN and small[w.lower()] * 9 <= n and w not in _TITLES]
    if not names:
        return None
    name, title = "|".join(sorted(names, key=len, reverse=True)), "|".join(_TITLES)
    return re.compile(rf"\b(?:(?:{title})\.? )?(?:{name})(?: (?:{name}))*\b")
