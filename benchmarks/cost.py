"""What a train step costs by the width of a GPT, the length of its rows and the rows of a batch, beside what it should.

    python -m benchmarks.cost [--rounds=9] [--out=benchmarks/results]

THE train step, float32, AdamW, on one device. Along each axis the other two stand still; what is expected is the step's
FLOPs at the rate of the axis' largest step, and the slope says how time grows with the size: log-log, least squares.
Other work on the machine comes and goes, so rounds alternate between all sizes, and the figures are medians over them.
Writes cost.json and cost.png.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from llm import sharding
from llm.data import ObjectiveSpec
from llm.data.objectives import causal
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.training import loop, state
from llm.training.spec import OptimizerSpec, TrainingSpec
from llm.training.step import put_batch

VOCAB, LAYERS = 512, 4


class Size(NamedTuple):
    """A step's size: D, T and B."""

    width: int
    length: int
    rows: int


MIDDLE = Size(128, 128, 8)
AXES = {"width": (64, 128, 256, 512), "length": (64, 128, 256, 512), "rows": (2, 4, 8, 16, 32)}
SMOKE = {"width": (16, 32), "length": (16, 32), "rows": (2, 4)}
SMOKE_MIDDLE = Size(16, 16, 2)


def step_of(size: Size) -> tuple[Callable[[], Any], float]:
    """(runs one step and waits for it, its FLOPs: three forward passes)."""
    model = build(GPTSpec(VOCAB, size.length, layers=LAYERS, width=size.width, heads=4, unroll=LAYERS))
    training, optimizer = TrainingSpec(batch_size=size.rows), OptimizerSpec(warmup_steps=0)
    mesh = sharding.make_mesh(sharding.MeshSpec())
    jax.set_mesh(mesh)
    recipe = loop.recipe(model, training, optimizer, ObjectiveSpec(), seed=0)
    current = state.create(recipe, mesh)
    flops = 3 * model.flops_per_token(current.params, size.length) * size.rows * size.length
    step = loop.build_step(recipe, training, optimizer, ObjectiveSpec(), mesh)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size.rows, size.length + 1))
    batch = put_batch(mesh, causal(tokens[:, :-1], tokens[:, 1:], np.ones((size.rows, size.length), np.int32)))

    def run() -> None:
        nonlocal current
        current, metrics = step(current, batch)
        jax.block_until_ready(metrics)

    return run, flops


def measure(axes: dict[str, tuple[int, ...]], middle: Size, rounds: int) -> dict[str, list[dict[str, float]]]:
    """By axis, a row for each size: its value, FLOPs, and the median, least and most seconds of a step."""
    sizes = {name: [middle._replace(**{name: value}) for value in values] for name, values in axes.items()}
    steps = {size: step_of(size) for size in dict.fromkeys(size for line in sizes.values() for size in line)}
    seconds: dict[Size, list[float]] = {size: [] for size in steps}
    for run, _ in steps.values():
        run()  # compiles
    for _ in range(rounds):
        for size, (run, _) in steps.items():
            start = time.perf_counter()
            run()
            seconds[size].append(time.perf_counter() - start)
    return {
        name: [
            {
                "value": getattr(size, name),
                "flops": steps[size][1],
                "median": statistics.median(seconds[size]),
                "least": min(seconds[size]),
                "most": max(seconds[size]),
            }
            for size in line
        ]
        for name, line in sizes.items()
    }


def slope(rows: list[dict[str, float]], of: str) -> float:
    """The exponent of the power of the axis by which a column grows: log-log least squares."""
    return float(np.polyfit(np.log([row["value"] for row in rows]), np.log([row[of] for row in rows]), 1)[0])


def picture(path: pathlib.Path, found: dict[str, list[dict[str, float]]], middle: Size) -> None:
    """A panel an axis: medians with the range of rounds, and the FLOPs at the rate of the largest step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"width": "width", "length": "row length (tokens)", "rows": "batch (rows)"}
    figure, every = plt.subplots(1, len(found), figsize=(13, 4.5), sharey=True, layout="constrained")
    for axes, (name, rows) in zip(every, found.items(), strict=True):
        x, median = [row["value"] for row in rows], [1e3 * row["median"] for row in rows]
        around = [[m - 1e3 * row["least"] for m, row in zip(median, rows)],
                  [1e3 * row["most"] - m for m, row in zip(median, rows)]]  # fmt: skip
        axes.errorbar(x, median, yerr=around, fmt="o-", markersize=4, capsize=3, color="tab:blue",
                      label=f"measured, slope {slope(rows, 'median'):.2f}")  # fmt: skip
        rate = rows[-1]["flops"] / median[-1]
        axes.plot(x, [row["flops"] / rate for row in rows], "--", color="tab:orange",
                  label=f"by FLOPs, slope {slope(rows, 'flops'):.2f}")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(labels[name])
        still = ", ".join(f"{other} {value}" for other, value in middle._asdict().items() if other != name)
        axes.set_title(still)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    every[0].set_ylabel("a train step (ms)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results"), help="a folder")
    parser.add_argument("--smoke", action="store_true", help="the least sizes")
    flags = parser.parse_args()
    if flags.rounds < 1:
        parser.error(f"--rounds={flags.rounds}: expected at least 1")
    axes, middle = (SMOKE, SMOKE_MIDDLE) if flags.smoke else (AXES, MIDDLE)
    found = measure(axes, middle, flags.rounds)
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    slopes = {name: {of: round(slope(rows, of), 3) for of in ("median", "flops")} for name, rows in found.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "rounds": flags.rounds,
        "middle": middle._asdict(),
        "slopes": slopes,
        "steps": found,
    }
    (out / "cost.json").write_text(json.dumps(result, indent=2) + "\n")
    picture(out / "cost.png", found, middle)
    for name, rows in found.items():
        print(f"{name}: time grows as its power {slopes[name]['median']:.2f}, FLOPs as {slopes[name]['flops']:.2f}")
        for row in rows:
            print(
                f"  {row['value']:>5}  {1e3 * row['median']:8.1f} ms  {row['flops'] / row['median'] / 1e9:6.1f} GFLOP/s"
            )
    print(out / "cost.png")


if __name__ == "__main__":
    main()
