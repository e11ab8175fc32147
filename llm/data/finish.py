"""The last phase: rows, checks, and the report; then the prepared folder appears under its name."""

import hashlib
import itertools
import json
import pathlib
import shutil

from llm.data import conversations, messages, pack, report
from llm.data.shards import Shards
from llm.data.split import SPLITS, TRAIN
from llm.data.work import Work, merge_tallies, whole, write_json
from llm.errors import InputError, RunFailed
from llm.tokenization import Tokenizer

REPORT = "report.json"


def finish(work: Work) -> None:
    """Plans the rows, checks that the accounts balance, and writes the report."""
    spec, folder, units = work.spec, work.folder, range(len(work.units))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    decided = work.account("all", "decide")
    before = [work.account(unit, "documents") for unit in units]
    after = [work.account(unit, "encode") for unit in units]
    stages = [
        *_tallies([a["tallies"] for a in before]),
        *decided["tallies"],
        *_tallies([a["tallies"] for a in after]),
    ]
    made = {
        "settings": spec.to_json(),
        "sources": json.loads((folder / "plan.json").read_text(encoding="utf-8"))["sources"],
        "skipped": sum(a["skipped"] for a in before),
        "stages": stages,
        "labels": decided["labels"],
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
    }
    for side in SPLITS:
        made[side] = _split(work, side, after)
    _check_balance(made)
    if spec.data.packing != "whole" and made[TRAIN]["tokens"] < spec.data.row_length:
        raise InputError(
            f"{spec.data.train}: {made[TRAIN]['tokens']} training tokens are fewer than one row of "
            f"data.row_length={spec.data.row_length}; add text or shorten the row"
        )
    _gather(work, "removed", [f"{unit:05d}.removed.jsonl" for unit in units], ["decide.removed.jsonl"],
            [f"{unit:05d}.encode-removed.jsonl" for unit in units])  # fmt: skip
    _gather(work, "skipped", [f"{unit:05d}.skipped.jsonl" for unit in units])
    made["files"] = {path.name: digest(path) for path in sorted(_kept_files(folder))}
    made["fingerprint"] = fingerprint(made["files"], tokenizer)
    report.draw_lengths(work, folder / "lengths.png")
    (folder / "report.md").write_text(report.markdown(made), encoding="utf-8")
    write_json(folder / REPORT, made)


def _tallies(accounts: list[list[dict]]) -> list[dict]:
    return [vars(tally) for tally in merge_tallies(accounts)]


def _split(work: Work, side: str, accounts: list[dict]) -> dict:
    """One split's rows and its account."""
    data = work.spec.data
    splits = [account["splits"][side] for account in accounts]
    documents = sum(s["documents"] for s in splits)
    if not documents:
        raise InputError(f"{data.validation or data.train}: no {side} text is left to make rows of; add text")
    shards = Shards.open(work.shards(side))
    account = {
        "documents": documents,
        "characters": sum(s["characters"] for s in splits),
        "text_tokens": sum(s["tokens"] for s in splits),
        "ids": list(itertools.chain.from_iterable(s["ids"] for s in splits))[:100],
        "bytes": shards.text_bytes,
    }
    lengths = conversations.token_lengths(shards.lengths(), shards.fields)
    account["text_tokens_in_shards"] = int(lengths.sum())
    if data.packing == "whole":
        account |= {"rows": len(shards), "tokens": int(lengths.sum())}
        longest = lengths.sum(axis=1)
        account["longer_than_a_row"] = int((longest > data.row_length).sum())
        return account
    # A text has a place more than tokens, a conversation one less.
    sizes = lengths[:, 0] - 2 if data.form == messages.CHAT else lengths[:, 0]
    plan = pack.plan(data.packing, sizes, data.row_length)
    plan.save(work.folder / f"{side}.rows.npz")
    account |= {"rows": len(plan), "tokens": plan.tokens, "filled": plan.tokens / (len(plan) * data.row_length)}
    return account


def _check_balance(made: dict) -> None:
    """Every stage passes on what the one before passed on, and loses only what it names."""
    last = None
    for stage in made["stages"]:
        gone = sum(entry[0] for entry in stage["dropped"].values())
        wrong = stage["documents_in"] != stage["documents_out"] + gone
        if last is not None:
            wrong |= (stage["documents_in"], stage["characters_in"]) != (last["documents_out"], last["characters_out"])
        if wrong:
            raise RunFailed(f"the account of {stage['stage']!r} does not balance: {stage}; please report this")
        last = stage
    assert last is not None
    split = made["train"], made["validation"]
    tail = made["settings"]["data"]["split_by"] == "tail"
    if sum(s["characters"] for s in split) != last["characters_out"] or (
        not tail and sum(s["documents"] for s in split) != last["documents_out"]
    ):
        raise RunFailed(f"the splits hold other text than {last['stage']!r} passed on; please report this")
    for s in split:
        if s.pop("text_tokens_in_shards") != s["text_tokens"]:
            raise RunFailed("token shards hold other tokens than were encoded; please report this")


def _gather(work: Work, name: str, *groups: list[str]) -> None:
    with whole(work.folder / f"{name}.jsonl") as file:
        for part in itertools.chain(*groups):
            path = work.folder / part
            if path.is_file():
                with path.open("rb") as source:
                    file.writelines(source)


def _kept_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [*folder.glob("*.tokens"), *folder.glob("*.rows.npz")]


def digest(path: pathlib.Path) -> dict:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fingerprint(files: dict[str, dict], tokenizer: Tokenizer) -> str:
    """What batches are made of, in 16 hex digits: every prepared file and the tokenizer."""
    value = json.dumps([tokenizer.fingerprint, sorted((name, f["sha256"]) for name, f in files.items())])
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def remove_intermediates(folder: pathlib.Path) -> None:
    """Removes what only phases read. The report is the mark of a finished folder, so this may be done twice."""
    keep = {"report.json", "report.md", "lengths.png", "removed.jsonl", "skipped.jsonl"}
    kept = set(_kept_files(folder))
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)  # logs of datatrove's tasks
        elif path.name not in keep and path not in kept:
            path.unlink()


def combined(fingerprints: list[str], weights: list[float]) -> str:
    """The fingerprint of a mixture."""
    return hashlib.sha256(json.dumps([fingerprints, weights]).encode()).hexdigest()[:16]
