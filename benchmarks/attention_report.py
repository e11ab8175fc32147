"""What becomes of the figures of benchmarks.attention: printed table, JSON, picture, the README's section."""

import importlib.util
import json
import pathlib
from collections.abc import Collection

from llm.errors import InputError

BEGIN, END = "<!-- attention -->", "<!-- end attention -->"
LOSS = 1.05  # a peer is faster when we take more than this times its time


def baseline(names: Collection[str]) -> str:
    """What the others are held against: the automatic choice, which on a CPU is not listed and is blockwise."""
    return "auto" if "auto" in names else "blockwise"


def print_rows(rows: list[dict]) -> None:
    """The table of one shape and pass, the fastest first."""
    ours = baseline([row["implementation"] for row in rows])
    heads = (rows[0]["pass"], "ms", "+-", "TFLOP/s", "of peak", "GB/s", "of read", "peak MB", f"x {ours}")
    lines: list[tuple[str, ...]] = [heads]
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        percent = [
            None if row[key] is None else f"{100 * row[key]:.0f}%" for key in ("of_matrix_ceiling", "of_read_ceiling")
        ]
        peak, ratio = row["peak_bytes"], row["time_to_baseline"]
        lines.append((
            row["implementation"], f"{row['median_ms']:.2f}", f"{row['spread_ms']:.2f}", f"{row['tflops']:.4f}",
            percent[0] or "-", f"{row['gb_s']:.2f}", percent[1] or "-",
            "-" if peak is None else f"{peak / 1e6:.1f}", "-" if ratio is None else f"{ratio:.2f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        first, *rest = (word.ljust(w) if n == 0 else word.rjust(w) for n, (word, w) in enumerate(zip(line, widths)))
        print(f"  {first}  {'  '.join(rest)}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def load(path: pathlib.Path) -> dict:
    """A file of results.

    Raises:
        InputError: it is none.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert saved.keys() >= {"device", "runs", "rows"}
    except (ValueError, AssertionError, AttributeError):
        raise InputError(f"{path} holds no results of benchmarks.attention; move it away and run again") from None
    return saved


def merge(path: pathlib.Path, device: str, run: dict, rows: list[dict]) -> None:
    """Puts the rows of a run into the device's file, over older ones of the same key; runs without rows go."""
    saved = load(path) if path.exists() else {"device": device, "runs": {}, "rows": {}}
    for row in rows:
        key = " | ".join(row[part] for part in ("shape", "dtype", "implementation", "pass"))
        saved["rows"][key] = {name: _short(value) for name, value in row.items()} | {"run": run["date"]}
    used = {row["run"] for row in saved["rows"].values()}
    saved["runs"] = {date: each for date, each in (saved["runs"] | {run["date"]: run}).items() if date in used}
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(path: pathlib.Path, dtype: str) -> pathlib.Path | None:
    """TFLOP/s against length of the causal shapes of preset long, or None when there are none or no matplotlib."""
    saved = load(path)
    rows = [row for row in saved["rows"].values() if row["dtype"] == dtype and _is_long(row)]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    # Ours keep their colours and lead the legend, whoever else was measured.
    names = sorted({row["implementation"] for row in rows}, key=lambda name: (not _ours(rows, name), name))
    passes = sorted({row["pass"] for row in rows}, key=len)
    lengths = sorted({row["length"] for row in rows})
    ceiling = max(saved["runs"][row["run"]]["matrix_tflops"] for row in rows)
    figure = Figure(figsize=(5.2 * len(passes) + 2.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axis, name_of_pass in zip(axes, passes):
        axis.axhline(ceiling, color="0.6", linestyle=":", label="matrix product, measured")
        for n, name in enumerate(names):
            line = sorted(
                (row["length"], row["tflops"])
                for row in rows
                if row["implementation"] == name and row["pass"] == name_of_pass
            )
            if line:
                ours = _ours(rows, name)
                axis.plot(
                    *zip(*line), color=f"C{n}", marker="os^Dv<>pP*"[n % 10], label=name, linewidth=2.5 if ours else 1.5,
                    linestyle="-" if ours else "--",
                )  # fmt: skip
        axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
        axis.set(xscale="log", yscale="log", title=name_of_pass, xlabel="length (queries = keys)")
        axis.xaxis.set_major_locator(FixedLocator(lengths))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        low, high = min(row["tflops"] for row in rows), max(ceiling, *(row["tflops"] for row in rows))
        ticks = [m * 10.0**e for e in range(-9, 5) for m in (1, 2, 5) if low / 1.3 <= m * 10.0**e <= high * 1.3]
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(color="0.9")
    axes[0].set_ylabel("TFLOP/s over visible scores")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    figure.suptitle(f"Causal attention, 1 x 8 heads x 64, {dtype}: {saved['device']}")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def _is_long(row: dict) -> bool:
    length = row["length"]
    return row["shape"] == f"B1 T{length} S{length} N8 K8 H64 causal"


def _ours(rows: list[dict], name: str) -> bool:
    return any(row["ours"] for row in rows if row["implementation"] == name)


# --- README -----------------------------------------------------------------------------------------------------------


def write_readme(readme: pathlib.Path, results: pathlib.Path) -> None:
    """Rewrites what stands between the markers from all results.

    Raises:
        InputError: the markers are not there, or there are no results.
    """
    paths = sorted(results.glob("attention-*.json"))
    if not paths:
        raise InputError(f"--readme: {results} holds no attention-*.json; run python -m benchmarks.attention first")
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(
            f"--readme: {readme.name} lacks the lines {BEGIN} and {END}; add them where the section belongs"
        )
    sections = "\n\n".join(_section(load(path), path) for path in paths)
    readme.write_text(f"{before}{BEGIN}\n{sections}\n{END}{after}", encoding="utf-8")


def _section(saved: dict, path: pathlib.Path) -> str:
    """One device: what it was measured with, the table, the picture, where we lose."""
    groups: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in saved["rows"].values():
        groups.setdefault((row["dtype"], row["shape"], row["pass"]), {})[row["implementation"]] = row
    lines, losses = [], []
    for (dtype, shape, name_of_pass), rows in groups.items():
        ours = rows.get(baseline(rows))
        peers = [row for row in rows.values() if not row["ours"]]
        if ours is None:
            continue
        best = min(peers, key=lambda row: row["median_ms"], default=None)
        cells = [shape, dtype, name_of_pass, _ms(ours["median_ms"]), f"{100 * ours['of_matrix_ceiling']:.0f}%"]
        if best is None:
            cells += ["none", "", ""]
        else:
            ratio = ours["median_ms"] / best["median_ms"]
            lost = ratio > LOSS
            cells += [best["implementation"], _ms(best["median_ms"]), f"**{ratio:.2f}**" if lost else f"{ratio:.2f}"]
            if lost:
                losses.append(
                    (ratio, f"- {shape}, {dtype}, {name_of_pass}: {ratio:.2f}x the time of {best['implementation']}")
                )
        lines.append(f"| {' | '.join(cells)} |")
    runs = list(saved["runs"].values())
    last = runs[-1]
    dates = " to ".join(dict.fromkeys((runs[0]["date"][:10], last["date"][:10])))
    versions = ", ".join(f"{name} {last[name]}" for name in ("python", "jax", "torch", "tokamax") if last.get(name))
    ceilings = sorted({(run["dtype"], run["matrix_tflops"], run["read_gb_s"]) for run in runs})
    spans = []
    for dtype in dict.fromkeys(each[0] for each in ceilings):
        tflops, gb_s = ([each[n] for each in ceilings if each[0] == dtype] for n in (1, 2))
        spans.append(f"{dtype} {_span(tflops)} TFLOP/s and {_span(gb_s)} GB/s")
    picture = path.with_suffix(".png")
    text = [
        f"### {saved['device']}",
        "",
        f"{versions}; {dates}. Ceilings, by run: {'; '.join(spans)}.",
        f"All implementations, with spread, bytes and memory: `results/{path.name}`.",
        "",
        "| Shape | Dtype | Pass | ours, ms | of ceiling | Best peer | its ms | ours / best peer |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        *(f"    {command}" for command in dict.fromkeys(run["command"] for run in runs)),
    ]
    if picture.exists():
        text += ["", f"![Speed against length, causal](results/{picture.name})"]
    text += ["", "Where we lose (a peer is faster by more than 5%):", ""]
    text += [line for _, line in sorted(losses, reverse=True)] or ["- nowhere"]
    return "\n".join(text)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
