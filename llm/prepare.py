"""`python -m llm.prepare`: raw text to clean, deduplicated, tokenized and packed training data, with a report."""

import os
import pathlib

from llm import cli
from llm.data import Execution, Prepared, packaged, prepare
from llm.run_folder import refuse_imported

DESCRIPTION = """\
Reads, cleans, deduplicates, splits, tokenizes and packs text into --workdir, where llm.train finds it.

  python -m llm.prepare --config=experiments/corpora/sotu.py --workdir=runs/sotu
  python -m llm.prepare --input=my/texts --workdir=runs/mine      a file, folder, glob, address or corpus
  python -m llm.prepare --list                                    the packaged corpora

Files are .txt, .md, .html, .jsonl, .csv, .tsv and .parquet, also as .gz, .bz2, .xz and .zst. A preparation that was
stopped goes on when the same command is given again. Every field can be set: --config.dedup.near=true.
data/report.md tells what each stage did, data/removed.jsonl which documents went and why.
"""


def main(argv: list[str]) -> None:
    """Parses, resolves the config, and prepares."""
    from llm import config  # here, because worker processes import this file and have no use for jax

    parser = cli.parser("prepare", DESCRIPTION)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="a corpus's or an experiment's config")
    parser.add_argument("--input", metavar="SOURCE", help="short for --config.data.train=SOURCE, with no holdout")
    parser.add_argument("--workdir", metavar="FOLDER", help="the run's folder")
    on_error = "short for --config.data.on_error: what to do with a record that cannot be read"
    parser.add_argument("--on-error", choices=("stop", "skip"), help=on_error)
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes; all cores by default")
    executors = "local, or datatrove's: datatrove (local tasks), slurm, ray"
    parser.add_argument("--executor", default="local", metavar="NAME", help=executors)
    tasks = "datatrove tasks; as many as workers by default"
    parser.add_argument("--tasks", type=int, default=0, metavar="N", help=tasks)
    parser.add_argument("--slurm-partition", default="", metavar="NAME")
    parser.add_argument("--slurm-time", default="08:00:00", metavar="H:M:S", help="time limit of a task")
    parser.add_argument("--list", action="store_true", help="list the packaged corpora")
    flags, rest = parser.parse_known_args(argv)
    if flags.list:
        print(cli.table([(corpus["name"], _about(corpus)) for corpus in packaged.describe()]))
        return
    if flags.workdir is None:
        parser.error("the following arguments are required: --workdir")
    loaded = config.load(flags.config) if flags.config else config.default_config(config.CORPUS)
    if flags.input is not None:
        # What a config says of the documents held out is about its own corpus.
        loaded.data.train, loaded.data.holdout, loaded.data.validation, loaded.data.more = flags.input, (), "", ()
    if flags.on_error is not None:
        loaded.data.on_error = flags.on_error
    preparation = config.resolve_preparation(config.override(loaded, cli.overrides(rest)))
    execution = Execution(flags.executor, flags.workers, flags.tasks, flags.slurm_partition, flags.slurm_time)
    workdir = cli.writable_workdir(flags.workdir)
    refuse_imported(workdir)
    prepared = prepare(preparation, workdir, execution=execution)
    if prepared is not None and "stages" in prepared.report:
        print(cli.table(_rows(prepared, workdir)))


def _about(corpus: dict) -> str:
    size = f"{corpus['documents']:,} documents, {corpus['characters'] / 1e6:.1f} M characters"
    return f"{corpus['about']} ({size}; {corpus['licence']}; {corpus['package']})"


def _rows(prepared: Prepared, workdir: pathlib.Path) -> list[tuple[str, str]]:
    report = prepared.report
    train, validation = report["train"], report["validation"]
    dropped = {
        f"  {reason}": f"{entry[0]:,} documents"
        for stage in report["stages"]
        for reason, entry in sorted(stage["dropped"].items())
    }
    return [
        ("read", f"{report['stages'][0]['documents_in']:,} documents" + (
            f", {report['skipped']:,} records skipped" if report["skipped"] else "")),
        *([("dropped", "")] if dropped else []),
        *dropped.items(),
        ("documents", f"{train['documents']:,} training, {validation['documents']:,} validation"),
        ("text", f"{train['bytes']:,} + {validation['bytes']:,} bytes"),
        ("tokens", f"{train['tokens']:,} + {validation['tokens']:,}"),
        ("rows", f"{train['rows']:,} + {validation['rows']:,} of {report['settings']['data']['row_length']} tokens"),
        ("vocabulary", f"{report['tokenizer']['vocab_size']:,}"),
        ("bytes per token", f"{train['bytes'] / max(1, train['text_tokens']):.2f}"),
        ("fingerprint", prepared.fingerprint),
        ("report", str(workdir / "data" / "report.md")),
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
