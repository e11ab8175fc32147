"""The stages in a row: read, clean, split, train the tokenizer, encode, pack, and write what training reads.

A prepared folder holds `train.*.npy`, `validation.*.npy` and `report.json`. It appears whole or not at all: it is
written beside its place and renamed.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from llm import tokenization
from llm.data.clean import clean
from llm.data.loader import ARRAYS, Dataset
from llm.data.pack import pack, token_dtype
from llm.data.sources import Document, read, stamp
from llm.data.spec import DataSpec
from llm.data.split import check_disjoint, split
from llm.errors import InputError
from llm.tokenization import Tokenizer, TokenizerSpec

DATA, REPORT, TOKENIZER = "data", "report.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What training reads: the tokenizer, both splits, the report, and the fingerprint of rows and tokenizer."""

    tokenizer: Tokenizer
    train: Dataset
    validation: Dataset
    report: dict
    fingerprint: str


def prepare(
    spec: DataSpec, tokenizer_spec: TokenizerSpec, workdir: pathlib.Path, say: Callable[[str], None] = print
) -> Prepared:
    """Prepares `workdir/data` and `workdir/tokenizer.json`, or opens them when they are there already.

    Raises:
        InputError: bad input of any stage, or data in the folder that other settings made.
    """
    settings = {"data": dataclasses.asdict(spec), "tokenizer": dataclasses.asdict(tokenizer_spec)}
    settings = json.loads(json.dumps(settings))
    folder = workdir / DATA
    if (folder / REPORT).is_file():
        prepared = open_prepared(workdir)
        _refuse_other_settings(prepared.report["settings"], settings, folder)
        for source, old in prepared.report["sources"].items():
            if stamp(source) not in (old, None):
                raise InputError(
                    f"{source} has changed since {folder} was prepared from it; name another workdir, or remove it"
                )
        say(f"data: {_summary(prepared.report)} (prepared before)")
        return prepared
    if folder.exists():
        raise InputError(f"{folder} is not prepared data (it has no {REPORT}); remove it or name another workdir")

    train, validation, read_report = _documents(spec)
    say(f"data: {len(train)} training and {len(validation)} validation documents; training the tokenizer")
    tokenizer = tokenization.train(tokenizer_spec, (d.text for d in train))

    partial = workdir / f"{DATA}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sources = {source: stamp(source) for source in (spec.train, spec.validation) if source}
    report = {"settings": settings, "sources": sources, "documents": read_report, "tokenizer": tokenizer.fingerprint}
    for name, documents in (("train", train), ("validation", validation)):
        report[name] = _write_split(partial, name, documents, tokenizer, spec.row_length)
    if report["train"]["tokens"] < spec.row_length:
        raise InputError(
            f"{spec.train}: {report['train']['tokens']} training tokens are fewer than one row of "
            f"data.row_length={spec.row_length}; add text or shorten the row"
        )
    report["fingerprint"] = _fingerprint(partial, tokenizer)
    (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    tokenizer_file = workdir / f"{TOKENIZER}.partial"
    tokenizer.save(tokenizer_file)
    tokenizer_file.replace(workdir / TOKENIZER)  # before the rows: rows in place mean a tokenizer in place
    partial.replace(folder)
    say(f"data: {_summary(report)}")
    return open_prepared(workdir)


def open_prepared(workdir: pathlib.Path) -> Prepared:
    """Opens what `prepare` wrote and checks that it is what it was.

    Raises:
        InputError: nothing was prepared there, or files are missing or changed since.
    """
    folder = workdir / DATA
    if not (folder / REPORT).is_file():
        raise InputError(f"{workdir} holds no prepared data; run llm.prepare or llm.train on it first")
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        fingerprint = _fingerprint(folder, tokenizer)
        train, validation = (Dataset.open(folder, name, report[name]["bytes"]) for name in ("train", "validation"))
        expected = report["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is damaged ({error}); remove it to prepare it again") from None
    if fingerprint != expected:
        raise InputError(
            f"{folder} or {TOKENIZER} beside it was changed since it was prepared (fingerprint {fingerprint}, was "
            f"{expected}); remove both to prepare them again"
        )
    return Prepared(tokenizer, train, validation, report, fingerprint)


def _documents(spec: DataSpec) -> tuple[list[Document], list[Document], dict]:
    """The cleaned documents of both sides and what reading and cleaning did."""
    found = read(spec.train)
    train = [d for d in map(clean, found) if d.text]
    report = {
        "read": len(found),
        "characters_read": sum(len(d.text) for d in found),
        "characters_cleaned": sum(len(d.text) for d in train),
    }
    if spec.validation:
        validation = [d for d in map(clean, read(spec.validation)) if d.text]
    else:
        train, validation = split(spec, train)
    for name, documents, source in (("training", train, spec.train), ("validation", validation, spec.validation)):
        if not documents:
            raise InputError(f"{source}: no {name} text is left after cleaning")
    check_disjoint(train, validation)
    return train, validation, report


def _write_split(
    folder: pathlib.Path, name: str, documents: list[Document], tokenizer: Tokenizer, row_length: int
) -> dict:
    ids = tokenizer.encode_batch([d.text for d in documents])
    rows = pack(ids, row_length, tokenizer.end_of_text, token_dtype(tokenizer.vocab_size))
    for array in ARRAYS:
        np.save(folder / f"{name}.{array}.npy", rows[array])
    return {
        "documents": len(documents),
        "ids": [d.id for d in documents[:100]],
        "bytes": sum(len(d.text.encode()) for d in documents),
        "tokens": sum(map(len, ids)) + len(ids),
        "rows": len(rows["tokens"]),
    }


def _fingerprint(folder: pathlib.Path, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for name in ("train", "validation"):
        for array in ARRAYS:
            with (folder / f"{name}.{array}.npy").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _refuse_other_settings(old: dict, new: dict, folder: pathlib.Path) -> None:
    changed = [
        f"{room}.{name}: {old[room].get(name)!r} -> {value!r}"
        for room in new
        for name, value in new[room].items()
        if old[room].get(name) != value
    ]
    if changed:
        raise InputError(
            f"{folder} was prepared with other settings ({'; '.join(changed)}); name another workdir, or remove it"
        )


def _summary(report: dict) -> str:
    train, validation = report["train"], report["validation"]
    return (
        f"{train['tokens']:,} training tokens in {train['rows']:,} rows, "
        f"{validation['tokens']:,} validation tokens ({validation['bytes']:,} bytes)"
    )
