"""The phases of a preparation, each a function from files to files: of one unit, or of all that went before.

documents  unit  read, clean, drop what can be judged alone; hashes and signatures for the next phase
decide     all   duplicates, lines of many documents, labels, what is held out
tokenizer  all   load or train the tokenizer
encode     unit  drop repeated lines, split, encode into token shards
finish     all   rows, checks, report (llm/data/finish.py)
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llm import tokenization
from llm.data import answers, conversations, dedup, duplicates, messages
from llm.data.clean import stages
from llm.data.documents import Document, Dropped, Note, Stage, Tally, apply
from llm.data.shards import ShardWriter
from llm.data.sources import read, read_all
from llm.data.split import SPLITS, TRAIN, held_out, sides
from llm.data.work import Work, decode_document, encode_document, tallies_to_json, whole
from llm.errors import InputError
from llm.tokenization import Tokenizer

BATCH = 256  # documents whose signatures, or ids, are computed together


# --- documents --------------------------------------------------------------------------------------------------------


def documents(work: Work, unit: int) -> None:
    """Reads and cleans the documents of a unit, and writes what deciding needs of each."""
    spec, evaluation = work.spec, work.evaluation[unit]
    found_stages = _stages(work, evaluation)
    tallies = [Tally("read"), *(Tally(name) for name, _ in found_stages)]
    skipped, removed = [], []

    def on_bad(where: str, reason: str, record: str) -> None:
        skipped.append({"where": where, "reason": reason, "record": record})

    stream = itertools.islice(read(work.units[unit], spec.data, on_bad), work.limits[unit])
    stream = apply(_pass, stream, tallies[0])
    for (_, stage), tally in zip(found_stages, tallies[1:]):
        stream = apply(stage, stream, tally, _listing(removed))

    columns = _Columns(work)
    with whole(work.path(unit, "documents.jsonl")) as file:
        while batch := list(itertools.islice(stream, BATCH)):
            lines = [encode_document(document) for document in batch]
            columns.add(batch, evaluation, file.tell() + np.cumsum([0, *map(len, lines[:-1])]))
            file.writelines(lines)
    columns.write(unit)
    _write_lines(work, unit, "removed", removed)
    _write_lines(work, unit, "skipped", skipped)
    work.finish(unit, "documents", {
        "tallies": tallies_to_json(tallies),
        "skipped": len(skipped),
        "labels": columns.labels,
        "ids": columns.ids[:8],
        "holdout": sorted({i for i in columns.ids if i in spec.data.holdout}),
    })  # fmt: skip


def _listing(removed: list[dict]) -> Callable[[Document, Dropped, str], None]:
    """What `apply` tells of dropped documents, as lines of removed.jsonl."""

    def listen(document: Document, dropped: Dropped, stage: str) -> None:
        removed.append({"id": document.id, "source": document.meta.get("source"), "stage": stage,
                        "reason": dropped.reason, "detail": dropped.detail})  # fmt: skip

    return listen


def _write_lines(work: Work, unit: int, name: str, records: list[dict]) -> None:
    with whole(work.path(unit, f"{name}.jsonl")) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)


def _stages(work: Work, evaluation: bool):
    """The stages of a unit. An evaluation source is normalised but never filtered: its scores stay comparable."""
    spec = work.spec
    found = [*stages(spec.clean, spec.data.fields, spec.data.form), *dedup.document_stages(spec.dedup)]
    if spec.dedup.contamination:
        found.append(("contamination", _contamination(work).stage))
    if evaluation:
        return [(name, stage if name in ("clean", "personal data") else _pass) for name, stage in found]
    return found


def _pass(document: Document, note: Note) -> Document:
    return document


@functools.lru_cache(maxsize=1)
def _contamination(work: Work) -> dedup.Contamination:
    spec = work.spec
    found: list[Document] = []
    normalise = stages(spec.clean, spec.data.fields, spec.data.form)[:1]
    for source in spec.dedup.contamination:
        stream: Iterable[Document] = read_all(spec.data, source)
        for _, stage in normalise:
            stream = apply(stage, stream, Tally("evaluation"))
        found += [Document(d.id, _whole_text(work, d), d.meta) for d in stream]
    return dedup.Contamination.of(found, spec.dedup.contamination_ngram)


def _whole_text(work: Work, document: Document) -> str:
    """All fields of a document as one text, which is what duplicates are looked for in."""
    fields = work.spec.data.fields
    return "\n".join(document.text if name == "text" else str(document.meta[name]) for name in fields)


class _Columns:
    """What deciding needs of each document of a unit, gathered batch by batch."""

    def __init__(self, work: Work):
        self.work, self.rows = work, {name: [] for name in ("offset", "length", "exact", "text", "id", "held")}
        self.bands: list[np.ndarray] = []
        self.parts = {"line": [], "paragraph": []}
        self.labels: dict[str, int] = {}
        self.ids: list[str] = []

    def add(self, batch: list[Document], evaluation: bool, offsets: np.ndarray) -> None:
        """Takes a batch, `offsets` being where each document's line begins in the unit's file."""
        spec, rows = self.work.spec, self.rows
        texts = [_whole_text(self.work, document) for document in batch]
        rows["offset"] += offsets.tolist()
        for document, text in zip(batch, texts):
            rows["length"].append(len(text))
            rows["exact"].append(np.frombuffer(dedup.exact_key(text), np.uint64))
            rows["text"].append(int(document.hash[:16], 16))
            rows["id"].append(dedup.hash_text(f"{document.id}\0{document.meta.get('source')}"))
            rows["held"].append(held_out(spec.data, document, evaluation))
            self.ids.append(document.id)
            if spec.data.label:
                label = str(document.meta[spec.data.label])
                self.labels[label] = self.labels.get(label, 0) + 1
        if spec.dedup.near:
            self.bands.append(dedup.band_keys([dedup.shingles(t, spec.dedup.shingle) for t in texts], spec.dedup))
        for unit, wanted in (("line", spec.dedup.corpus_lines), ("paragraph", spec.dedup.corpus_paragraphs)):
            if wanted and not evaluation:
                for document in batch:
                    parts = document.text.split(dedup.SEPARATORS[unit])
                    self.parts[unit].append(np.unique(dedup.line_keys(parts, spec.dedup.line_characters)))

    def write(self, unit: int) -> None:
        count = len(self.rows["offset"])
        kinds = {"offset": np.int64, "length": np.int64, "exact": np.uint64, "text": np.uint64, "id": np.uint64,
                 "held": bool}  # fmt: skip
        arrays = {name: np.array(values, kinds[name]) for name, values in self.rows.items()}
        arrays["exact"] = arrays["exact"].reshape(count, 2)
        with whole(self.work.path(unit, "table.npz")) as file:
            np.savez(file, allow_pickle=False, **arrays)
        spec = self.work.spec.dedup
        if spec.near:
            bands = np.concatenate(self.bands) if self.bands else np.empty((0, spec.bands), np.uint64)
            with whole(self.work.path(unit, "bands.npy")) as file:
                np.save(file, np.ascontiguousarray(bands.T))  # a band is read as one stretch
        for name, wanted in (("line", spec.corpus_lines), ("paragraph", spec.corpus_paragraphs)):
            if wanted:
                keys = np.concatenate(self.parts[name]) if self.parts[name] else np.empty(0, np.uint64)
                with whole(self.work.path(unit, f"{name}.npy")) as file:
                    np.save(file, np.sort(keys))


# --- decide -----------------------------------------------------------------------------------------------------------


def decide(work: Work) -> None:
    """Decides which documents stay, which lines go everywhere, and what the labels are."""
    spec = work.spec
    accounts = [work.account(unit, "documents") for unit in range(len(work.units))]
    _check_holdout(work, accounts)
    tables = [work.table(unit) for unit in range(len(work.units))]
    counts = [len(table["offset"]) for table in tables]
    starts = np.cumsum([0, *counts])
    joined = {name: np.concatenate([t[name] for t in tables]) for name in ("exact", "length", "text", "id", "held")}
    # What is held out by name stays, and its twin in training goes.
    evaluation = np.repeat(work.evaluation, counts) | (joined["held"] & bool(spec.data.holdout))
    table = duplicates.Table(joined["exact"], joined["length"], joined["text"], joined["id"], evaluation)
    texts = _Texts(work, tables, starts)
    alive = np.ones(len(evaluation), bool)
    tallies = []
    with whole(work.path("decide", "removed.jsonl")) as removed:
        for name, wanted in (("exact duplicates", spec.dedup.exact), ("near duplicates", spec.dedup.near)):
            if not wanted:
                continue
            if name.startswith("exact"):
                found, compared = duplicates.exact_duplicates(table), None
            else:
                bands = [np.load(work.path(unit, "bands.npy"), mmap_mode="r") for unit in range(len(work.units))]
                found, compared = duplicates.near_duplicates(table, bands, alive, texts.shingles, spec.dedup.threshold)
            tally = _removed_tally(name, spec.data.label, texts, alive, found, removed)
            if compared is not None:
                tally["compared"] = compared
            tallies.append(tally)
            alive[[removal.document for removal in found]] = False
    if not spec.dedup.exact:
        _check_disjoint(table, joined["held"], texts)
    for unit in range(len(work.units)):
        with whole(work.path(unit, "keep.npy")) as file:
            np.save(file, alive[starts[unit] : starts[unit + 1]])
    for name, more_than in (("line", spec.dedup.corpus_lines), ("paragraph", spec.dedup.corpus_paragraphs)):
        if more_than:
            parts = [np.load(work.path(unit, f"{name}.npy"), mmap_mode="r") for unit in range(len(work.units))]
            with whole(work.path("decide", f"{name}.npy")) as file:
                np.save(file, duplicates.frequent(parts, more_than))
    tail = spec.data.split_by == "tail" and not spec.data.validation and not spec.data.holdout
    held, left = int((joined["held"] & alive).sum()), int(alive.sum())
    _check_sides(work, held if not tail else left, left - held, len(evaluation))
    work.finish("all", "decide", {"tallies": tallies, "labels": _labels(work, accounts)})


def _removed_tally(name: str, label: str, texts: "_Texts", alive: np.ndarray, found, file) -> dict:
    before = texts.lengths[alive]
    tally = Tally(name, int(alive.sum()), int(before.sum()))
    gone = 0
    for removal in found:
        document, kept = texts.document(removal.document), texts.document(removal.kept)
        reason = name.removesuffix("s")
        record = {
            "id": document.id, "source": document.meta.get("source"), "stage": name, "reason": reason,
            "kept": kept.id, "kept_source": kept.meta.get("source"), "similarity": round(removal.similarity, 4),
        }  # fmt: skip
        if label and document.meta[label] != kept.meta[label]:
            # One of the two labels is wrong; a person may want to know which.
            record["reason"] = reason = f"{reason} of another label"
            record |= {"label": document.meta[label], "kept_label": kept.meta[label]}
        file.write(json.dumps(record).encode() + b"\n")
        tally.count(document, Dropped(reason, f"{removal.similarity:.3f} like {kept.id!r}, which stays"))
        gone += len(document.text)
    tally.documents_in, tally.characters_in = int(alive.sum()), int(before.sum())
    tally.documents_out, tally.characters_out = tally.documents_in - len(found), tally.characters_in - gone
    return tallies_to_json([tally])[0]


class _Texts:
    """Documents and shingles by their row in the whole corpus, read where they stand."""

    def __init__(self, work: Work, tables: list[dict], starts: np.ndarray):
        self._work, self._starts = work, starts
        self._offsets = [table["offset"] for table in tables]
        self.lengths = np.concatenate([self._text_lengths(unit, t) for unit, t in enumerate(tables)])
        self.shingles = functools.lru_cache(maxsize=1024)(self._shingles)

    def _text_lengths(self, unit: int, table: dict) -> np.ndarray:
        # The accounts count the text alone, the order of deciding all fields.
        if self._work.spec.data.fields == ("text",):
            return table["length"]
        return np.array([len(document.text) for document in self._work.documents(unit)], np.int64)

    def document(self, row: int) -> Document:
        unit = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._work.path(unit, "documents.jsonl").open("rb") as file:
            file.seek(int(self._offsets[unit][row - self._starts[unit]]))
            return decode_document(file.readline())

    def _shingles(self, row: int) -> np.ndarray:
        return dedup.shingles(_whole_text(self._work, self.document(row)), self._work.spec.dedup.shingle)


def _check_holdout(work: Work, accounts: list[dict]) -> None:
    data = work.spec.data
    seen = {i for account in accounts for i in account["holdout"]}
    missing = [name for name in data.holdout if name not in seen]
    if missing:
        ids = sorted({i for account in accounts for i in account["ids"]})
        shown = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
        raise InputError(
            f"data.holdout names {missing[0]!r}, which is not among the documents that cleaning left of "
            f"{data.train}; those are {shown}"
        )


def _check_disjoint(table: duplicates.Table, held: np.ndarray, texts: _Texts) -> None:
    """Refuses a validation text that also stands in training, where dedup.exact does not take it out."""
    for removal in duplicates.exact_duplicates(table):
        if held[removal.document] != held[removal.kept]:
            one, two = texts.document(removal.document), texts.document(removal.kept)
            raise InputError(
                f"{one.id!r} ({one.meta.get('source')}) and {two.id!r} ({two.meta.get('source')}) are one text in "
                "training and validation; set dedup.exact=true, or remove one of them"
            )


def _check_sides(work: Work, validation: int, train: int, documents_: int) -> None:
    data = work.spec.data
    if not documents_:
        raise InputError(f"{data.train}: the corpus is empty, no text is left after cleaning")
    if validation and train:
        return
    if data.validation:
        side, source = ("training", data.train) if validation else ("validation", data.validation)
        raise InputError(f"{source}: no {side} text is left after cleaning and deduplication")
    side = "validation" if train else "training"
    tail = "" if data.split_by == "tail" else ", or data.split_by=tail to hold out the end of every document"
    raise InputError(
        f"{data.train}: nothing of its {documents_} documents falls on the {side} side; add text, or set "
        f"data.validation to another source{tail}"
    )


def _labels(work: Work, accounts: list[dict]) -> list[str]:
    """The classes, sorted: the id of a class is its place. A class that only evaluation has cannot be learned."""
    if not work.spec.data.label:
        return []
    train = {name for account, held in zip(accounts, work.evaluation) if not held for name in account["labels"]}
    for account, held in zip(accounts, work.evaluation):
        unknown = sorted(set(account["labels"]) - train) if held else []
        if unknown:
            raise InputError(f"{work.spec.data.validation}: the label {unknown[0]!r} does not stand in training")
    return sorted(train)


# --- tokenizer and encode ---------------------------------------------------------------------------------------------


def tokenizer(work: Work) -> None:
    """Loads the tokenizer, or trains it on training documents, evenly thinned to `tokenizer.sample_bytes`."""
    spec = work.spec.tokenizer
    if spec.path:
        made = tokenization.load(spec)
    else:
        size = sum(work.path(unit, "documents.jsonl").stat().st_size for unit in range(len(work.units)))
        share = min(1.0, spec.sample_bytes / max(1, size))
        made = tokenization.train(spec, _training_texts(work, share))
    partial = work.path("all", "tokenizer.partial")
    made.save(partial)
    partial.replace(work.folder / "tokenizer.json")
    work.finish("all", "tokenizer", {"fingerprint": made.fingerprint, "vocab_size": made.vocab_size})


def _training_texts(work: Work, share: float) -> Iterator[str]:
    for unit in range(len(work.units)):
        for side, document in _kept(work, unit, []):
            if side == TRAIN and int(document.hash[8:16], 16) < share * 2**32:
                for name in work.spec.data.fields:
                    yield _field(work, document, name)


def _field(work: Work, document: Document, name: str) -> str:
    """A field as it is encoded: the line feed that ends a text belongs to streams, not to examples."""
    text = document.text if name == "text" else str(document.meta[name])
    return text.removesuffix("\n") if work.spec.data.packing == "whole" else text


def _kept(
    work: Work, unit: int, tallies: list[Tally], removed=lambda *_: None, last: tuple[str, Stage] | None = None
) -> Iterator[tuple[str, Document]]:
    """The documents of a unit that stay, without the lines of many documents, under their splits.

    They pass through a `last` stage, named, where there is one.
    """
    keep, held = np.load(work.path(unit, "keep.npy")), work.table(unit)["held"]
    held_ids = iter(held[keep].tolist())
    stream: Iterator[Document] = (d for d, stays in zip(work.documents(unit), keep) if stays)
    # Whether a document is held out was decided on its text before lines are dropped: it travels beside it.
    stream = (Document(d.id, d.text, {**d.meta, _HELD: h}) for d, h in zip(stream, held_ids))
    spec = work.spec.dedup
    for name, wanted in (("paragraph", spec.corpus_paragraphs), ("line", spec.corpus_lines)):
        if wanted:
            tallies.append(Tally(f"{name}s of many documents"))
            if not work.evaluation[unit]:
                listed = np.load(work.path("decide", f"{name}.npy"))
                stage = functools.partial(dedup.drop_parts, unit=name, least=spec.line_characters, listed=listed)
                stream = apply(stage, stream, tallies[-1], removed)
            else:
                stream = apply(_pass, stream, tallies[-1])
    if work.spec.data.answer:
        tallies.append(Tally("answers"))
        stream = apply(functools.partial(answers.locate, key=work.spec.data.answer), stream, tallies[-1], removed)
    if last is not None:
        tallies.append(Tally(last[0]))
        stream = apply(last[1], stream, tallies[-1], removed)
    for document in stream:
        meta = dict(document.meta)
        yield from sides(work.spec.data, Document(document.id, document.text, meta), meta.pop(_HELD))


_HELD = "\0held out"


@functools.lru_cache(maxsize=1)
def _tokenizer(work: Work) -> Tokenizer:
    """The tokenizer, once a process: a loaded one fills caches of its own, which are slow to go."""
    return Tokenizer.load(work.folder / "tokenizer.json")


def encode(work: Work, unit: int) -> None:
    """Encodes the documents of a unit that stay into one token shard a split."""
    data = work.spec.data
    made = _tokenizer(work)
    labels = {name: number for number, name in enumerate(work.account("all", "decide")["labels"])}
    tallies: list[Tally] = []
    removed: list[dict] = []

    last = None
    if data.form != messages.TEXT:
        stage = functools.partial(
            conversations.encode, tokenizer=made, form=data.form, row_length=data.row_length, on_error=data.on_error
        )
        last = "conversations", stage
    stream = _kept(work, unit, tallies, _listing(removed), last)
    writers = {
        side: ShardWriter(
            work.path(unit, f"{side}.tokens"),
            vocab_size=made.vocab_size,
            fields=data.example_fields,
            labels=_label_names(work),
            tokenizer=made.fingerprint,
        )
        for side in SPLITS
    }
    split = {side: {"documents": 0, "characters": 0, "tokens": 0, "ids": []} for side in SPLITS}
    while batch := list(itertools.islice(stream, BATCH)):
        texts = {name: [_field(work, document, name) for _, document in batch] for name in data.fields}
        ids: dict[str, list] = {}
        if last is None:
            ids = {name: made.encode_batch(values, name != data.fields[0]) for name, values in texts.items()}
        for number, (side, document) in enumerate(batch):
            sequences = [ids[name][number] for name in ids] or document.meta[conversations.ENCODED]
            size = sum(len(texts[name][number].encode("utf-8")) for name in data.fields)
            account = split[side]
            account["documents"] += 1
            account["characters"] += len(document.text)
            if len(account["ids"]) < 100:
                account["ids"].append(document.id)
            for fields, values in _examples(work, made, document, sequences, labels):
                writers[side].add(fields, values, text_bytes=size, name=document.id)
                account["tokens"] += sum(map(len, fields[:1] if data.form == messages.CHAT else fields))
                size = 0  # of all windows of a text, the first counts its bytes
    for writer in writers.values():
        writer.close()
    _write_lines(work, unit, "encode-removed", removed)
    work.finish(unit, "encode", {"tallies": tallies_to_json(tallies), "splits": split})


def _examples(work: Work, made: Tokenizer, document: Document, sequences: list, labels: dict[str, int]) -> Iterator:
    """(ids by field, labels) of a document's examples: one, or where it answers a question one a window."""
    data = work.spec.data
    if not data.answer:
        yield sequences, [labels[str(document.meta[data.label])]] if data.label else []
        return
    question, _ = sequences
    context, spans = made.encode_with_offsets(_field(work, document, "text"))
    answer = document.meta[data.answer]
    cut = answers.windows(context, spans, answer, len(question), data.row_length)
    for number, (window, span) in enumerate(cut):
        yield [question, window], [*span, number]


def _label_names(work: Work) -> tuple[str, ...]:
    """The integer labels that every example carries in its shard."""
    data = work.spec.data
    return answers.LABELS if data.answer else (data.label,) if data.label else ()
