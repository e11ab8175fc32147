"""`python -m llm.plan`: what training an experiment takes on hardware that is not there."""

import pathlib

from llm import cli, config
from llm.devices import published
from llm.errors import InputError
from llm.planning import page, suggest, topology
from llm.planning.program import compile_program
from llm.training.metrics import write_json

DESCRIPTION = """\
Compiles the train step of an experiment for other hardware and says what it needs: memory, network, days, device-hours.

No accelerator and no account: a TPU's step is compiled by libtpu (pip install libtpu), an H100's by JAX's CUDA plugin,
and cpu:8 splits this machine. Data and tokenizer are not looked at; the vocabulary is the config's.

    python -m llm.plan --config=experiments/gpt/gpt3.py:175b --topology=v5p:8x8x16 --config.mesh.fsdp=128 \\
        --config.mesh.tensor=8
"""


def main(argv: list[str]) -> None:
    """Parses, compiles, prints the page."""
    parser = cli.parser("plan", DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiments/gpt/gpt3.py:175b")
    parser.add_argument("--topology", required=True, metavar="NAME", help=topology.NAMES)
    parser.add_argument("--tokens", metavar="N", help="the token budget, 300e9; by default the config's steps")
    parser.add_argument(
        "--suggest", nargs="?", const=3, metavar="N", help="rank the meshes that fit, and compile the best N (3)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    flags, rest = parser.parse_known_args(argv)
    budget = None if flags.tokens is None else _positive("--tokens", flags.tokens)
    count = None if flags.suggest is None else int(_positive("--suggest", str(flags.suggest)))
    out = None if flags.json is None else _writable(flags.json)
    experiment = config.resolve(config.override(config.load(flags.config), cli.overrides(rest)))
    devices = topology.make(flags.topology)
    if count is not None:
        ranked = suggest.ranked(experiment, devices, count, say=cli.say_error)
        print("\n".join(suggest.table(ranked)))
        if out is not None:
            write_json(out, {"topology": devices.name, "meshes": [one._asdict() for one in ranked]})
        return
    program = compile_program(experiment, devices)
    found = page.figures(experiment, program, budget)
    for title, rows in page.sections(experiment, found, published(devices.devices[0].device_kind)):
        print(f"\n{title}\n{cli.table(rows)}")
    if out is not None:
        write_json(out, found)
    page.check_fits(found)


def _positive(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise InputError(f"{flag}={text}: expected a number of 1 or more")
    return value


def _writable(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--json={name}: expected a file in a folder that exists")
    return path


if __name__ == "__main__":
    cli.run(main)
