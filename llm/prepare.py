"""`python -m llm.prepare`: text to packed rows and a tokenizer."""

from llm import cli, config
from llm.data import prepare

DESCRIPTION = """\
Reads, cleans, splits, tokenizes and packs text into --workdir, where llm.train finds it.

  python -m llm.prepare --input=my/texts --workdir=runs/mine      a folder of .txt and .jsonl, or one such file
  python -m llm.prepare --config=experiments/quickstart.py --workdir=runs/quickstart

A .txt file is one document, a .jsonl line is one under "text". Without --config, settings are the defaults of the
gpt family; each can be set, --config.data.row_length=256.
"""


def main(argv: list[str]) -> None:
    """Parses, resolves the config, and prepares."""
    parser = cli.parser("prepare", DESCRIPTION)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="an experiment config")
    parser.add_argument("--input", metavar="PATH", help="short for --config.data.train=PATH, with no holdout")
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="the run's folder")
    flags, rest = parser.parse_known_args(argv)
    loaded = config.load(flags.config) if flags.config else config.default_config("gpt")
    if flags.input is not None:
        # What a config says of the documents held out is about its own corpus.
        loaded.data.train, loaded.data.holdout, loaded.data.validation = flags.input, (), ""
    experiment = config.resolve(config.override(loaded, cli.overrides(rest)))
    prepared = prepare(experiment.data, experiment.tokenizer, cli.writable_workdir(flags.workdir))
    train, validation = prepared.report["train"], prepared.report["validation"]
    print(
        cli.table(
            [
                ("documents", f"{train['documents']:,} training, {validation['documents']:,} validation"),
                ("text", f"{train['bytes']:,} + {validation['bytes']:,} bytes"),
                ("tokens", f"{train['tokens']:,} + {validation['tokens']:,}"),
                ("rows", f"{train['rows']:,} + {validation['rows']:,} of {experiment.data.row_length} tokens"),
                ("vocabulary", f"{prepared.tokenizer.vocab_size:,}"),
                ("bytes per token", f"{train['bytes'] / train['tokens']:.2f}"),
                ("fingerprint", prepared.fingerprint),
            ]
        )
    )


if __name__ == "__main__":
    cli.run(main)
