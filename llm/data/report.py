"""The report of a preparation for people: report.md, and the lengths of documents as a picture."""

import pathlib

import numpy as np

from llm.data import conversations
from llm.data.shards import Shards
from llm.data.split import SPLITS
from llm.data.work import Work


def markdown(made: dict) -> str:
    """The readable form of report.json."""
    data, train, validation = made["settings"]["data"], made["train"], made["validation"]
    lines = [
        f"# {data['train']}",
        "",
        f"Fingerprint `{made['fingerprint']}`, tokenizer `{made['tokenizer']['fingerprint']}` with "
        f"{made['tokenizer']['vocab_size']:,} entries.",
        "",
        "| split | documents | characters | bytes | tokens of text | tokens in rows | rows | filled |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, split in (("train", train), ("validation", validation)):
        filled = f"{split['filled']:.1%}" if "filled" in split else "unpacked"
        lines.append(
            f"| {name} | {split['documents']:,} | {split['characters']:,} | {split['bytes']:,} "
            f"| {split['text_tokens']:,} | {split['tokens']:,} "
            f"| {split['rows']:,} | {filled} |"
        )
    for name, split in (("train", train), ("validation", validation)):
        if split.get("longer_than_a_row"):
            together = " in all their fields together" if len(data["fields"]) > 1 else ""
            lines += ["", f"{split['longer_than_a_row']:,} {name} examples have more than {data['row_length']} "
                          f"tokens{together}; what does not fit a row is cut when batches are made."]  # fmt: skip
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


def bins(shortest: int, longest: int) -> list[int]:
    """Edges of bins that widen with the lengths in them.

    They are whole numbers and never narrow again: a bin that holds one length more than its neighbours would show a
    peak where there is none.
    """
    edges, width = [shortest], 1
    while edges[-1] <= longest:
        width = max(width, edges[-1] // 6)
        edges.append(edges[-1] + width)
    return edges


def draw_lengths(work: Work, path: pathlib.Path) -> None:
    """A histogram of document lengths in tokens, both splits, on logarithmic lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lengths = {}
    for side in SPLITS:
        shards = Shards.open(work.shards(side))
        lengths[side] = np.maximum(conversations.token_lengths(shards.lengths(), shards.fields).sum(axis=1), 1)
    edges = bins(min(int(values.min()) for values in lengths.values()), max(int(v.max()) for v in lengths.values()))
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for side, values in lengths.items():
        axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.6, label=f"{side} ({len(values):,})")
    row, buckets = work.spec.data.row_length, work.spec.data.buckets
    for bucket in buckets[:-1]:
        axes.axvline(bucket, color="grey", linestyle=":", linewidth=1, label="buckets" if bucket == buckets[0] else "")
    axes.axvline(row, color="black", linestyle="--", linewidth=1, label=f"row of {row}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
