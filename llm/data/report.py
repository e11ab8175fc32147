"""The report of a preparation for people: report.md, and the lengths of documents as a picture."""

import pathlib

import numpy as np

from llm.data.shards import Shards
from llm.data.split import SPLITS
from llm.data.work import Work


def markdown(made: dict) -> str:
    """The readable form of report.json."""
    data, train, validation = made["settings"]["data"], made["train"], made["validation"]
    source = ", ".join(data["prepared"]) or data["train"]
    lines = [
        f"# {source}",
        "",
        f"Fingerprint `{made['fingerprint']}`, tokenizer `{made['tokenizer']['fingerprint']}` with "
        f"{made['tokenizer']['vocab_size']:,} entries.",
        "",
        "| split | documents | characters | bytes | tokens | rows | filled |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, split in (("train", train), ("validation", validation)):
        filled = f"{split['filled']:.1%}" if "filled" in split else "unpacked"
        lines.append(
            f"| {name} | {split['documents']:,} | {split['characters']:,} | {split['bytes']:,} | {split['tokens']:,} "
            f"| {split['rows']:,} | {filled} |"
        )
    for name, split in (("train", train), ("validation", validation)):
        if split.get("longer_than_a_row"):
            lines += ["", f"{split['longer_than_a_row']:,} {name} examples are longer than a row of "
                          f"{data['row_length']} tokens and are cut when batches are made."]  # fmt: skip
    if made["labels"]:
        lines += ["", f"Classes ({len(made['labels'])}): " + ", ".join(made["labels"])]
    lines += [
        "",
        "![Lengths of documents in tokens](lengths.png)",
        "",
        "## Stages",
        "",
        f"Records that could not be read: {made['skipped']:,}" + (" (skipped.jsonl)." if made["skipped"] else "."),
        "Documents that were dropped, with the reason and, for duplicates, what stays in their place: removed.jsonl.",
        "",
        "| stage | documents in | out | characters in | out | dropped | changed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for stage in made["stages"]:
        dropped = sum(entry[0] for entry in stage["dropped"].values())
        changed = sum(entry[0] for entry in stage["changed"].values())
        lines.append(
            f"| {stage['stage']} | {stage['documents_in']:,} | {stage['documents_out']:,} | {stage['characters_in']:,} "
            f"| {stage['characters_out']:,} | {dropped:,} | {changed:,} |"
        )
    for stage in made["stages"]:
        for kind, entries in (("dropped", stage["dropped"]), ("changed", stage["changed"])):
            for reason, (first, second, examples) in sorted(entries.items()):
                what = f"{first:,} documents, {second:,} characters" if kind == "dropped" else (
                    f"{first:,} times in {second:,} documents")  # fmt: skip
                lines += ["", f"### {stage['stage']}: {reason} ({kind}: {what})", ""]
                lines += [f"- `{_code(e['id'])}`" + (f": `{_code(e['detail'])}`" if e["detail"] else "")
                          for e in examples]  # fmt: skip
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return text.replace("`", "'").replace("\n", "⏎").replace("\r", "␍")


def draw_lengths(work: Work, path: pathlib.Path) -> None:
    """A histogram of document lengths in tokens, both splits, on logarithmic lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = {}
    for side in SPLITS:
        paths = [p for unit in range(len(work.units)) if (p := work.path(unit, f"{side}.tokens")).is_file()]
        lengths[side] = np.maximum(Shards.open(paths).lengths().sum(axis=1), 1)
    top = max(int(values.max()) for values in lengths.values())
    # At least one bin a power of two, and whole numbers between them.
    edges = np.unique(np.round(np.geomspace(1, top + 1, 41)).astype(np.int64))
    edges = edges if len(edges) > 1 else np.array([1, 2])
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for side, values in lengths.items():
        axes.hist(values, bins=edges.tolist(), histtype="stepfilled", alpha=0.6, label=f"{side} ({len(values):,})")
    row = work.spec.data.row_length
    axes.axvline(row, color="black", linestyle="--", linewidth=1, label=f"row of {row}")
    axes.set_xscale("log")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
