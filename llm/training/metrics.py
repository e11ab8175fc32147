"""Records of a run: metrics.jsonl, TensorBoard events, Weights & Biases, the arithmetic rate, and the curves."""

import importlib
import json
import logging
import math
import os
import pathlib
import time
import uuid
from typing import Any

import jax
import jax.numpy as jnp

from llm.devices import published
from llm.errors import InputError

MEASURED = "the measured float32 matrix product"
# Of a row, what the machine and its load decide, not the run: all else is the same after a resume.
OF_THE_MACHINE = (
    "tokens_per_second", "mfu", "input_wait", "compiles", "surplus_compiles", "memory_bytes", "peak_memory_bytes",
)  # fmt: skip


class MetricsLog:
    """metrics.jsonl, one row a logged step, and the same numbers as TensorBoard events, and for a tracker.

    A resumed run passes its first step: rows at or after it, which a killed run may have left, are dropped.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, tracker: Any = None):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import, and only training needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        path = workdir / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= first_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        # The plain writer, not SummaryWriter: that one writes in a thread, and when a full disk ends the thread, its
        # queue fills up and the next add waits for ever. Here a write that fails raises.
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        self._event, self._scalar = Event, scalar
        self._tracker = tracker
        # A number that is not finite needs no second line.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        start = SessionLog(status=SessionLog.START)  # hides what a killed run wrote at this step or later
        self._events.write_event(Event(step=first_step + 1, wall_time=time.time(), session_log=start))

    def write(self, row: dict) -> None:
        """Adds a row; it has `step` and `loss`, and its other numbers by name.

        JSON has no NaN: numbers that are not finite stand in metrics.jsonl as text, "nan", which float() reads.
        """
        shown = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
        self._file.write(json.dumps(shown) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                summary = self._scalar(name, value)
                self._events.write_event(self._event(step=row["step"], wall_time=time.time(), summary=summary))
        self._events.flush()
        if self._tracker is not None:
            numbers = {name: value for name, value in row.items() if name != "step"}
            self._tracker.log(numbers, step=row["step"])

    def close(self, failed: bool = False) -> None:
        """Flushes all of them; a tracker is told whether the run failed."""
        self._file.close()
        self._events.close()
        if self._tracker is not None:
            self._tracker.finish(exit_code=int(failed))


def wandb_package(project: str) -> Any:
    """The package of Weights & Biases, where a project of it is named; else None.

    Raises:
        InputError: it is not installed.
    """
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            f"training.wandb={project!r} needs the package wandb ({error}): pip install wandb, or leave training.wandb "
            "empty"
        ) from None


def open_wandb(package: Any, project: str, workdir: pathlib.Path, config: dict) -> Any:
    """A run of Weights & Biases, which a resumed run of ours goes on with: its id is kept in `workdir`.

    What a killed run had recorded after its last checkpoint stands there already, and comes again with equal numbers.
    """
    path = workdir / "wandb.id"
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        partial.replace(path)
    return package.init(
        project=project, name=workdir.name, id=path.read_text(encoding="utf-8").strip(), resume="allow",
        dir=str(workdir), config=config,
    )  # fmt: skip


def read(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that a kill cut off is left out."""
    path = workdir / "metrics.jsonl"
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def measured_peak_flops(size: int = 1024, repeats: int = 5) -> float:
    """Operations per second of the fastest of a few float32 matrix products on the first device."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops() -> tuple[float, str]:
    """(operations a second of one device, in words): of accelerators the data sheet's, else what is measured here."""
    sheet = published(jax.devices()[0].device_kind)
    if sheet is not None:
        return sheet.flops, f"the {sheet.name}'s bfloat16 peak"
    return measured_peak_flops(), MEASURED


def plot_curves(workdir: pathlib.Path, final: dict[str, float | None]) -> pathlib.Path:
    """Draws curves.png: training and validation loss, accuracy where there is one, and the learning rate, by step.

    Args:
        workdir: of the run.
        final: scores of the whole validation set at the end, "loss" and "accuracy".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(workdir)
    accuracy = "accuracy" in final
    heights = (3, 2, 1) if accuracy else (3, 1)
    figure, every = plt.subplots(
        len(heights), 1, figsize=(8, 2 * sum(heights) - 2), sharex=True, height_ratios=heights, layout="constrained"
    )
    loss_axes, rate_axes = every[0], every[-1]
    steps = [row["step"] for row in rows]
    losses = [float(row["loss"]) for row in rows]
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, one batch")
    loss_axes.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")

    def validated(name: str) -> list[tuple[int, float]]:
        seen = [(row["step"], float(row[f"validation.{name}"])) for row in rows if f"validation.{name}" in row]
        last = final.get(name)
        return seen if last is None else [*seen, (steps[-1], last)]

    def draw(axes, name: str) -> None:
        if points := validated(name):
            axes.plot(*zip(*points), "o-", color="tab:orange", markersize=4, label="validation")

    draw(loss_axes, "loss")
    loss_axes.set_ylabel(f"loss (nats per {'example' if accuracy else 'token'})")
    loss_axes.set_title(workdir.name)
    loss_axes.grid(alpha=0.3)
    loss_axes.legend()
    if accuracy:
        trained = [float(row["accuracy"]) for row in rows]
        every[1].plot(steps, _smooth(trained), color="tab:blue", label="training, smoothed")
        draw(every[1], "accuracy")
        every[1].set_ylabel("accuracy")
        every[1].grid(alpha=0.3)
        every[1].legend()
    rate_axes.plot(steps, [row["learning_rate"] for row in rows], color="tab:green")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.grid(alpha=0.3)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _smooth(values: list[float], factor: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = factor * total + (1 - factor) * value, factor * weight + (1 - factor)
        result.append(total / weight)
    return result
