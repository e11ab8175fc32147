"""Conversations about the embedded novels, made without an annotator: where a passage is from, and who is named in it.

Each passage gives two questions and their answers, which a program can judge. The paragraphs of every tenth place are
held out, and so is the novel that no model here is trained on. A preference has the right answer to one of the
questions and a wrong one: another novel, or the names of the passage before.
"""

import itertools
import lzma
import pathlib
import random
from collections.abc import Iterator

from llm.data.cloze import HELD_OUT, mentions
from llm.data.packages import Part

WHICH, WHO = "Which novel is this from?", "Who is named in it?"
NOBODY = "Nobody."
WORDS = range(12, 41)  # of a passage
EVERY = 10  # of so many passages one is held out
TITLES = {
    "emma": "Emma",
    "mansfield_park": "Mansfield Park",
    "northanger_abbey": "Northanger Abbey",
    "pride_and_prejudice": "Pride and Prejudice",
    "sense_and_sensibility": "Sense and Sensibility",
}


def chats(folder: pathlib.Path) -> Iterator[Part]:
    """(part, record) of a conversation of two questions about every passage."""
    for part, name, passage, names in passages(folder):
        asked = [(f"{passage}\n{WHICH}", f"{TITLES[name]}."), (WHO, names)]
        turns = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in asked]
        yield part, _record(name, passage) | {"messages": list(itertools.chain.from_iterable(turns))}


def preferences(folder: pathlib.Path) -> Iterator[Part]:
    """(part, record) of one of the questions about every passage, with a right and a wrong answer."""
    before = NOBODY
    for number, (part, name, passage, names) in enumerate(passages(folder)):
        draw = random.Random(number)
        prompt = [{"role": "user", "content": f"{passage}\n{WHICH}"}]
        right, wrong = TITLES[name], draw.choice([title for title in TITLES.values() if title != TITLES[name]])
        if number % 2 and before != names:
            prompt += [{"role": "assistant", "content": f"{right}."}, {"role": "user", "content": WHO}]
            chosen, rejected = names, before
        else:
            chosen, rejected = f"{right}.", f"{wrong}."
        before = names
        yield part, _record(name, passage) | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def passages(folder: pathlib.Path) -> Iterator[tuple[str, str, str, str]]:
    """(part, novel, passage, the names in it as an answer) of every paragraph of a fitting length."""
    for path in sorted(folder.glob("*.txt.xz")):
        name = path.name.removesuffix(".txt.xz")
        if name == HELD_OUT:
            continue
        text = lzma.decompress(path.read_bytes()).decode("utf-8")
        mention = mentions(text)
        assert mention is not None, name
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        fitting = [paragraph for paragraph in paragraphs if len(paragraph.split()) in WORDS]
        for number, passage in enumerate(fitting):
            named = dict.fromkeys(found[0] for found in mention.finditer(passage))
            yield "test" if number % EVERY == 0 else "train", name, passage, f"{', '.join(named)}." if named else NOBODY


def _record(name: str, passage: str) -> dict:
    return {"text": passage, "source": name}
