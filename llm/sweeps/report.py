"""What a sweep has found: sweep.json, the table on the terminal, and sweep.png."""

import pathlib
from collections.abc import Sequence
from typing import Any

from llm.training.metrics import write_json

Row = dict[str, Any]  # as `llm.sweeps.runs.row` makes them


def loss_of(row: Row) -> float | None:
    """A finished run's validation loss; None where there is none."""
    return row.get("validation", {}).get("loss")


def best(rows: Sequence[Row]) -> Row | None:
    """The row of the lowest validation loss."""
    scored = [(loss, i) for i, row in enumerate(rows) if (loss := loss_of(row)) is not None]
    return rows[min(scored)[1]] if scored else None


def write(workdir: pathlib.Path, location: str, rows: Sequence[Row]) -> None:
    """Writes sweep.json and, of runs that have a loss, sweep.png."""
    found = best(rows)
    write_json(
        workdir / "sweep.json",
        {"config": location, "best": None if found is None else found["name"], "runs": list(rows)},
    )
    if found is not None:
        plot(workdir, rows)


def table(rows: Sequence[Row]) -> str:
    """Each setting with its validation loss and time."""
    first, cells = best(rows), [("setting", "loss", "time", "")]
    for row in rows:
        loss, seconds = loss_of(row), row.get("total_seconds")
        cells.append(
            (
                row["name"],
                "-" if loss is None else f"{loss:.4f}",
                "-" if seconds is None else f"{seconds:.0f} s",
                "best" if row is first else "" if row["state"] == "finished" else row.get("why", row["state"]),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {loss:>{widths[1]}}  {seconds:>{widths[2]}}  {note}".rstrip()
        for name, loss, seconds, note in cells
    )


def lines(rows: Sequence[Row]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The field along the horizontal axis, and a line of (value, loss) for each choice of the other fields.

    It is the numeric field with the most values by which some settings differ alone; "" where there is none, and each
    setting is then a place of its own.
    """
    scored = [row for row in rows if loss_of(row) is not None]

    def others(row: Row, path: str) -> str:
        return ", ".join(f"{p.rpartition('.')[2]}={v}" for p, v in row["fields"].items() if p != path and p in varied)

    every = list(dict.fromkeys(path for row in scored for path in row["fields"]))
    values = {path: {str(row["fields"].get(path, "as it is")) for row in scored} for path in every}
    varied = [path for path in every if len(values[path]) > 1]
    found, most = "", 1
    for path in varied:
        numbers = [row["fields"].get(path) for row in scored]
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
            continue
        # With every setting on a line of its own, nothing is compared along the axis.
        alone = len({others(row, path) for row in scored}) == len(scored)
        if len(set(numbers)) > most and not alone:
            found, most = path, len(set(numbers))
    drawn: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(scored):
        loss = loss_of(row)
        assert loss is not None
        name, x = (others(row, found), row["fields"][found]) if found else ("", i)
        drawn.setdefault(name, []).append((x, loss))
    return found, {name: sorted(points) for name, points in drawn.items()}


def plot(workdir: pathlib.Path, rows: Sequence[Row]) -> pathlib.Path:
    """Draws sweep.png: validation loss by the field that is swept, a line for each choice of the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    field, drawn = lines(rows)
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for name, points in drawn.items():
        axes.plot(*zip(*points), "o-" if field else "o", markersize=4, label=name or None)
    if field:
        xs = [x for points in drawn.values() for x, _ in points]
        if min(xs) > 0 and max(xs) / min(xs) >= 8:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(field.replace("_", " ").replace(".", ": "))
    else:
        names = [row["name"] for row in rows if loss_of(row) is not None]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    if any(drawn):
        axes.legend()
    axes.set_ylabel("validation loss (nats)")
    axes.set_title(workdir.name)
    axes.grid(alpha=0.3)
    path = workdir / "sweep.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
