"""Preparing a workdir: plan the units, run the phases, open what came out.

`workdir/data` holds token shards, rows, `report.json`, `report.md`, `lengths.png`, `removed.jsonl` and `skipped.jsonl`,
`workdir/tokenizer.json` the tokenizer. The folder appears whole or not at all: the phases work in `data.partial`, where
a preparation that was stopped goes on, and the last step renames it.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable

from llm import tokenization
from llm.data import finish, messages, objectives
from llm.data.execute import Execution, execute
from llm.data.loader import Dataset
from llm.data.mixture import Mixture
from llm.data.objectives import Specials
from llm.data.shards import Shards
from llm.data.sources import Unit, read, stamp, units
from llm.data.spec import ObjectiveSpec
from llm.data.split import TRAIN, VALIDATION
from llm.data.work import PLAN, Preparation, Work, write_json
from llm.errors import InputError
from llm.tokenization import Tokenizer

DATA, TOKENIZER, SUBMITTED = "data", "tokenizer.json", "submitted"
CHECK_BYTES = 2**30  # beyond that, opening checks the sizes of files but not each byte


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What training reads: the tokenizer, both splits, the report, and the fingerprint of rows and tokenizer."""

    tokenizer: Tokenizer
    train: Dataset | Mixture
    validation: Dataset | Mixture
    report: dict
    fingerprint: str

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of their numbers; [] where nothing is labelled."""
        return list(self.report.get("labels", []))


def prepare(
    spec: Preparation,
    workdir: pathlib.Path,
    say: Callable[[str], None] = print,
    execution: Execution = Execution(),
    quiet: bool = False,
) -> Prepared | None:
    """Prepares `workdir/data` and `workdir/tokenizer.json`, or opens them when they are there already.

    Returns:
        What was prepared; None when Slurm has the tasks and goes on by itself.

    Raises:
        InputError: bad input of any stage, or data in the folder that other settings or inputs made.
    """
    if spec.data.prepared:
        return _refer(spec, workdir, say)
    folder, partial = workdir / DATA, workdir / f"{DATA}.partial"
    _check_objective(spec)
    plan = {"settings": spec.to_json(), "sources": _stamps(spec)}
    if (folder / finish.REPORT).is_file():
        shutil.rmtree(partial, ignore_errors=True)
        prepared = open_prepared(workdir, spec.objective)
        changes = _changes(prepared.report, plan)
        if changes:
            raise InputError(f"{folder} was prepared {', '.join(changes)}; name another workdir, or remove it")
        say(f"data: {_summary(prepared.report)} (prepared before)")
        return prepared
    if folder.exists():
        raise InputError(
            f"{folder} is not prepared data (it has no {finish.REPORT}); remove it or name another workdir"
        )
    if not _goes_on(partial, plan, say):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / PLAN, plan | {"units": _units(spec)})
    if execution.executor == "slurm":
        (partial / SUBMITTED).touch()
    if not execute(partial, execution, quiet):
        say("data: Slurm has the tasks; when they are done, the same command shows the result")
        return None
    # The tokenizer first: data in place means a tokenizer in place.
    shutil.copyfile(partial / TOKENIZER, workdir / f"{TOKENIZER}.partial")
    (workdir / f"{TOKENIZER}.partial").replace(workdir / TOKENIZER)
    finish.remove_intermediates(partial)
    partial.replace(folder)
    prepared = open_prepared(workdir, spec.objective)
    say(f"data: {_summary(prepared.report)}")
    return prepared


def open_prepared(workdir: pathlib.Path, objective: ObjectiveSpec = ObjectiveSpec()) -> Prepared:
    """Opens what `prepare` wrote and checks that it is what it was.

    Raises:
        InputError: nothing was prepared there, or files are missing or changed since.
    """
    folder = workdir / DATA
    if not (folder / finish.REPORT).is_file():
        raise InputError(f"{workdir} holds no prepared data; run llm.prepare or llm.train on it first")
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    try:
        report = json.loads((folder / finish.REPORT).read_text(encoding="utf-8"))
        if "prepared" in report:
            return _open_mixture(workdir, tokenizer, report, objective)
        _check_files(folder, report, tokenizer)
        train, validation = (_dataset(folder, side, report, tokenizer, objective) for side in (TRAIN, VALIDATION))
        return Prepared(tokenizer, train, validation, report, report["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is damaged ({error}); remove it to prepare it again") from None


def _check_files(folder: pathlib.Path, report: dict, tokenizer: Tokenizer) -> None:
    changed = InputError(
        f"{folder} or {TOKENIZER} beside it was changed since it was prepared; remove both to prepare them again"
    )
    if finish.fingerprint(report["files"], tokenizer) != report["fingerprint"]:
        raise changed
    every_byte = sum(entry["bytes"] for entry in report["files"].values()) <= CHECK_BYTES
    for name, entry in report["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} is damaged ({name} is missing); remove it to prepare it again")
        if path.stat().st_size != entry["bytes"] or (every_byte and finish.digest(path) != entry):
            raise changed


def _dataset(folder: pathlib.Path, side: str, report: dict, tokenizer: Tokenizer, objective: ObjectiveSpec) -> Dataset:
    data = report["settings"]["data"]
    _check_order(objective, data["packing"])
    paths = [folder / name for name in sorted(report["files"]) if name.endswith(f".{side}.tokens")]
    rows = folder / f"{side}.rows.npz"
    return Dataset.open(
        Shards.open(paths),
        rows if data["packing"] != "whole" else None,
        objective,
        specials(tokenizer),
        row_length=data["row_length"],
        buckets=tuple(data["buckets"]),
        classes=len(report["labels"]),
        training=side == TRAIN,
    )


def specials(tokenizer: Tokenizer) -> Specials:
    """The ids of the special tokens that objectives need, and which ids begin a word."""
    return Specials(
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        pad=tokenizer.pad,
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        mask=tokenizer.mask,
        bos=tokenizer.bos,
        opens=tokenizer.opens,
        sentinels=tokenizer.sentinels,
        starts_word=tokenizer.starts_word,
    )


def _check_order(objective: ObjectiveSpec, packing: str) -> None:
    follows = objective.stream or objective.kind in objectives.FOLLOWING
    if follows and packing != "concatenate":
        name = "objective.stream=True" if objective.stream else f"objective.kind={objective.kind!r}"
        raise InputError(f"{name} follows the text from row to row: data.packing={packing!r} does not keep its order")


def _check_objective(spec: Preparation) -> None:
    """Refuses, before anything is read, an objective that such data or such a tokenizer cannot serve."""
    data = spec.data
    _check_order(spec.objective, data.packing)
    if spec.objective.kind == "span_qa" and not data.answer:
        raise InputError("objective.kind='span_qa' needs data.answer, the record key of the answer")
    if data.form != messages.TEXT:
        _check_text_alone(spec)
    # Which special tokens a tokenizer has does not depend on the text that it is trained on.
    tokenizer = tokenization.load(spec.tokenizer) if spec.tokenizer.path else tokenization.train(spec.tokenizer, ["a"])
    objectives.require(
        spec.objective,
        specials(tokenizer),
        packed=data.packing != "whole",
        fields=data.example_fields,
        classes=2 if data.label else 0,
        row_length=data.row_length,
    )
    if data.form != messages.TEXT and tokenizer.end_of_turn is None:
        raise InputError(
            f"data.form={data.form!r}: the tokenizer's chat template ends an answer by no special token, so nothing "
            "would end what is written; give another one in tokenizer.chat_template"
        )


def _check_text_alone(spec: Preparation) -> None:
    """Refuses what would change the text of a conversation and leave its messages as they are."""
    rooms = {"dedup": ("document_lines", "document_paragraphs", "corpus_lines", "corpus_paragraphs"),
             "clean": ("markup",)}  # fmt: skip
    for room, names in rooms.items():
        for name in names:
            if getattr(getattr(spec, room), name):
                raise InputError(
                    f"{room}.{name}: messages of data.form={spec.data.form!r} are kept whole; leave it off"
                )


# --- plan -------------------------------------------------------------------------------------------------------------


def _stamps(spec: Preparation) -> dict[str, str | None]:
    sources = [
        spec.data.train,
        *spec.data.more,
        spec.data.validation,
        *spec.dedup.contamination,
        spec.clean.words,
        spec.tokenizer.path,
    ]
    return {source: stamp(source) for source in sources if source}


def _units(spec: Preparation) -> list[dict]:
    """The units of both sources, each with the number of documents that is read of it (None: all)."""
    planned = []
    training = [(source, False) for source in (spec.data.train, *spec.data.more)]
    for source, evaluation in (*training, (spec.data.validation, True)):
        if not source:
            continue
        found = units(spec.data, source)
        for unit, limit in _limits(spec, found):
            planned.append({"unit": dataclasses.asdict(unit), "evaluation": evaluation, "limit": limit})
    return planned


def _limits(spec: Preparation, found: list[Unit]) -> list[tuple[Unit, int | None]]:
    left = spec.data.max_documents
    if left is None:
        return [(unit, None) for unit in found]
    limited = []
    for unit in found:
        if left == 0:
            break
        count = sum(1 for _ in itertools.islice(read(unit, spec.data, lambda *_: None), left))
        limited.append((unit, count))
        left -= count
    return limited


def _goes_on(partial: pathlib.Path, plan: dict, say: Callable[[str], None]) -> bool:
    """Whether what an earlier command left half done is this command's to finish; if not, it says why."""
    if not (partial / PLAN).is_file():
        return False
    begun = json.loads((partial / PLAN).read_text(encoding="utf-8"))
    changes = _changes(begun, plan)
    if changes and (partial / SUBMITTED).is_file():
        raise InputError(f"{partial} was given to Slurm {'; '.join(changes)}; end those jobs and remove it")
    if changes:
        say(f"data: {partial} was begun {'; '.join(changes)}: starting anew")
        return False
    # Whether to stop at a bad record may change on the way: units that are done had none, or kept them aside.
    write_json(partial / PLAN, begun | plan)
    work = Work.open(partial)
    done = sum(work.done(unit, "documents") for unit in range(len(work.units)))
    say(f"data: going on with {partial}, where {done} of {len(work.units)} units are read")
    return True


def _changes(old: dict, new: dict) -> list[str]:
    """What settings or inputs are not those that a folder was made from, named."""
    # A field that is younger than a folder is at its default there.
    begun = {room: Preparation().to_json()[room] | old["settings"].get(room, {}) for room in new["settings"]}
    settings = [
        f"{room}.{name}: {begun[room][name]!r} -> {value!r}"
        for room in new["settings"]
        for name, value in new["settings"][room].items()
        if begun[room][name] != value and (room, name) != ("data", "on_error")
    ]
    # A source that is gone cannot have been changed: what was prepared from it still serves.
    sources = [source for source, mark in old["sources"].items() if new["sources"].get(source) not in (mark, None)]
    return [
        *([f"with other settings ({'; '.join(settings)})"] if settings else []),
        *(f"before {source} has changed" for source in sources if not settings),
    ]


def _summary(report: dict) -> str:
    train, validation = report[TRAIN], report[VALIDATION]
    return (
        f"{train['tokens']:,} training tokens in {train['rows']:,} rows, "
        f"{validation['tokens']:,} validation tokens ({validation['bytes']:,} bytes)"
    )


# --- mixtures ---------------------------------------------------------------------------------------------------------


def _refer(spec: Preparation, workdir: pathlib.Path, say: Callable[[str], None]) -> Prepared:
    """Makes a workdir's data out of folders that were prepared before, by reference."""
    folder = workdir / DATA
    parts = [open_prepared(pathlib.Path(path), spec.objective) for path in spec.data.prepared]
    for path, part in zip(spec.data.prepared, parts):
        if part.tokenizer.fingerprint != parts[0].tokenizer.fingerprint:
            raise InputError(
                f"data.prepared: {path} has another tokenizer than {spec.data.prepared[0]}; prepare it with "
                f"--config.tokenizer.path={pathlib.Path(spec.data.prepared[0]) / TOKENIZER}"
            )
        row_length = part.report["settings"]["data"]["row_length"] if "settings" in part.report else None
        if row_length not in (None, spec.data.row_length):
            raise InputError(
                f"data.row_length={spec.data.row_length}, but {path} was prepared with rows of {row_length}; "
                "set it to that"
            )
    report = {
        "prepared": [str(pathlib.Path(path).resolve()) for path in spec.data.prepared],
        "fingerprints": [part.fingerprint for part in parts],
        "weights": list(spec.data.weights),
    }
    if (folder / finish.REPORT).is_file():
        old = json.loads((folder / finish.REPORT).read_text(encoding="utf-8"))
        if {name: old.get(name) for name in report} != report:
            raise InputError(
                f"{folder} was made of other prepared folders or weights; name another workdir, or remove it"
            )
    else:
        shutil.copyfile(pathlib.Path(spec.data.prepared[0]) / TOKENIZER, workdir / f"{TOKENIZER}.partial")
        (workdir / f"{TOKENIZER}.partial").replace(workdir / TOKENIZER)
        folder.mkdir(exist_ok=True)
        write_json(folder / finish.REPORT, report)
    prepared = open_prepared(workdir, spec.objective)
    say(f"data: a mixture of {len(parts)} prepared folders: {', '.join(_summary(p.report) for p in parts)}")
    return prepared


def _open_mixture(workdir: pathlib.Path, tokenizer: Tokenizer, report: dict, objective: ObjectiveSpec) -> Prepared:
    parts = [open_prepared(pathlib.Path(path), objective) for path in report["prepared"]]
    for path, part, expected in zip(report["prepared"], parts, report["fingerprints"]):
        if part.fingerprint != expected:
            raise InputError(f"{path} was prepared again since {workdir} was made from it; name another workdir")
    train = Mixture([part.train for part in parts], report["weights"] or [len(part.train) for part in parts])
    validation = Mixture([part.validation for part in parts], [len(part.validation) for part in parts])
    digest = finish.combined(report["fingerprints"], report["weights"])
    return Prepared(tokenizer, train, validation, report, digest)
