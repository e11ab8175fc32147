"""What an evaluation leaves in a run's folder, and what it prints."""

import json
import pathlib
from typing import Any

from llm.evaluation.classification import confusion_picture
from llm.evaluation.scores import Scores

RECORDS, CONFUSION = "validation.jsonl", "confusion.png"


def write_records(scores: Scores, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes validation.jsonl, a line an example, and of a classifier confusion.png; returns what was written."""
    written = []
    if scores.records:
        path = workdir / RECORDS
        partial = path.with_name(path.name + ".partial")
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in scores.records)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
        written.append(path)
    if scores.classes:
        path = workdir / CONFUSION
        confusion_picture(scores.numbers["confusion"], scores.classes, path, workdir.name)
        written.append(path)
    return written


def rows(objective: str, numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the main scores, for people."""

    # What finished before intervals were kept has none.
    def between(interval, digits: int = 3) -> str:
        return f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""

    def percent(value, interval=None) -> str:
        return f"{100 * value:.2f}%{between(interval and [100 * x for x in interval], 2)}"

    if objective == "classification":
        found = [
            ("accuracy", percent(numbers["accuracy"], numbers["accuracy_interval"])),
            ("F1 macro", percent(numbers["macro"]["f1"], numbers.get("macro_f1_interval"))),
            ("F1 weighted", percent(numbers["weighted"]["f1"])),
            ("examples", f"{numbers['examples']:,}"),
        ]
    elif objective == "contrastive":
        found = [
            ("recall at 1", percent(numbers["recall_at_1"], numbers["recall_at_1_interval"])),
            ("recall at 5", percent(numbers["recall_at_5"])),
            ("mean reciprocal rank", f"{numbers['mean_reciprocal_rank']:.4f}"),
            ("examples", f"{numbers['examples']:,}"),
        ]
    elif objective == "span_qa":
        found = [
            ("exact match", percent(numbers["exact_match"], numbers["exact_match_interval"])),
            ("F1", percent(numbers["f1"], numbers["f1_interval"])),
            ("examples", f"{numbers['examples']:,}"),
        ]
    elif objective == "preference":
        found = [
            ("preference accuracy", percent(numbers["accuracy"], numbers["accuracy_interval"])),
            ("margin", f"{numbers['margin']:.4f}"),
            ("rewards", f"{numbers['chosen_reward']:.4f} chosen, {numbers['rejected_reward']:.4f} rejected"),
            ("loss", f"{numbers['loss']:.5f} nats/pair"),
            ("pairs", f"{numbers['examples']:,}"),
        ]
    else:
        bytes_ = f" encoding {numbers['bytes']:,} bytes" if "bytes" in numbers else ""
        found = [
            ("validation tokens", f"{numbers['tokens']:,}{bytes_}"),
            ("loss", f"{numbers['loss']:.5f} nats/token"),
            ("perplexity", f"{numbers['perplexity']:.3f}{between(numbers.get('perplexity_interval'))}"),
        ]
        if "bits_per_byte" in numbers:
            found.append(("bits per byte", f"{numbers['bits_per_byte']:.5f}"))
        if "answers" in numbers:
            exact = percent(numbers["exact_match"], numbers["exact_match_interval"])
            found.append(("exact match", f"{exact} of {numbers['answers']:,} answers"))
        if "bleu" in numbers:
            low, high = numbers["bleu_interval"]
            found += [
                ("BLEU", f"{numbers['bleu']:.2f} ({low:.2f} to {high:.2f}) {numbers['bleu_signature']}"),
                ("chrF", f"{numbers['chrf']:.2f} {numbers['chrf_signature']}"),
                ("exact match", percent(numbers["exact_match"])),
            ]
    return found
