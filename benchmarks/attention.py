"""Speed and memory of our attention and of its peers, in one process, on the device that is there.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.attention [--preset=llama|bert|t5|long|decode] [--shapes=1,512,512,8,2,64,causal;...]
    python -m benchmarks.attention --tune [--dtype=bfloat16] [--widths=64,128,256]  # block sizes of our kernels
    python -m benchmarks.attention --readme     # rewrites the section of benchmarks/README.md from the results

Peers that are installed and run on the device join in; the others are listed with the reason. Nothing wrong is timed:
before the timing, out (and dq, dk, dv) of every implementation are held against a float64 oracle: out and dq at up to
16 query rows of every batch row and head, and all rows, dk and dv of as many batch rows and key heads as make 2**26
scores, at least one (benchmarks/attention_cases.py). Programs are compiled and called once before; then the
implementations alternate round by round, and the figures are medians over rounds with the interquartile range. A bias
is a constant here: no implementation is asked for its gradient.

FLOPs count the visible scores only: 4 H a score forward, 10 H backward. The ceilings of matrix products and of reading
memory are measured in the same process. Bytes are the least that any implementation must move. Results accumulate in
benchmarks/results/attention-<device>.json, keyed by shape, dtype, implementation and pass; its picture lies beside it.
"""

import concurrent.futures
import datetime
import importlib.metadata
import io
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_report
from benchmarks.attention_cases import PRESETS, Case, check, make_inputs, oracle, parse_case, preset, tolerance
from benchmarks.attention_peers import Implementation, Prepared, all_implementations, one_line
from llm import cli
from llm.errors import InputError, RunFailed

DTYPES = ("float32", "bfloat16", "float16")
PASSES = ("forward", "forward + backward")
SECONDS = 15.0  # of timing a shape and pass; at least three rounds are made whatever they take
# The largest float32 matrix of scores that an implementation which holds it whole is given.
SCORES_ON_CPU, SCORES = 2**30, 2**33
READMES = pathlib.Path(__file__).parent


def main(argv: list[str]) -> None:
    """Checks, times, prints and writes; or writes the README's section."""
    flags = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe shows each line when it is there, too
    if flags.readme:
        attention_report.write_readme(READMES / "README.md", pathlib.Path(flags.out))
        return
    if flags.tune:
        from benchmarks import attention_tune  # which imports this file

        dtype = flags.dtype or "bfloat16"
        return attention_tune.tune(dtype, [_width(word) for word in _words([flags.widths])], flags.repeats)
    own = [parse_case(text) for each in flags.shapes for text in each.split(";") if text.strip()]
    names = _words(flags.preset) or ([] if own else ["llama"])
    for name in names:
        if name not in PRESETS:
            raise InputError(f"--preset={name}: there is no such preset; there are {', '.join(PRESETS)}")
    implementations = _chosen(_words(flags.implementations))
    out = None if flags.check_only else cli.writable_workdir(flags.out)

    # Peers outside jax need memory of the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = flags.dtype or ("float32" if on_cpu else "bfloat16")
    cases = list(dict.fromkeys([case for name in names for case in preset(name, on_cpu)] + own))
    run = {
        "command": _command(argv),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "dtype": dtype,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "jaxlib", "torch", "tokamax", "flash-attn")},
    }
    name, slug = device_name(device)
    print(f"{name}, {dtype}, jax {run['jax']}, torch {run['torch']}, tokamax {run['tokamax']}")
    there: list[Implementation] = []
    for each in implementations:
        reason = each.not_here(device.platform)
        if reason is None:
            there.append(each)
        else:
            print(f"  left out: {each.name} {reason}")
    if not flags.check_only:
        run["matrix_tflops"] = round(matrix_ceiling(dtype, on_cpu), 4)
        run["read_gb_s"] = round(read_ceiling(on_cpu), 2)
        print(f"  measured ceilings: {run['matrix_tflops']:.3f} TFLOP/s in products, {run['read_gb_s']:.1f} GB/s read")
    rows, wrong = [], []
    for case in cases:
        new, failed = measure(case, dtype, there, None if flags.check_only else flags.repeats, run)
        rows += new
        wrong += failed
    if out is not None and rows:
        path = out / f"attention-{slug}.json"
        attention_report.merge(path, name, run, rows)
        print(f"-> {path}")
        picture = attention_report.draw(path, dtype)
        print(f"-> {picture}" if picture else "no picture: no shape of preset long was measured, or no matplotlib")
    if wrong:
        raise RunFailed(f"wrong numbers, not timed: {'; '.join(wrong)}")


def _parse(argv: list[str]):
    parser = cli.parser("", __doc__ or "")
    parser.prog = "python -m benchmarks.attention"
    parser.add_argument("--preset", action="append", default=[], help=f"of {', '.join(PRESETS)}; default llama")
    parser.add_argument("--shapes", action="append", default=[], metavar="B,T,S,N,K,H[,causal][,bias][,lengths];...")
    parser.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--implementations", action="append", default=[], help="only these, ours and peers, by name")
    parser.add_argument("--check-only", action="store_true", help="check the numbers, time and write nothing")
    parser.add_argument(
        "--repeats", type=int, default=15, help=f"rounds at most, within {SECONDS:.0f} s but at least 3"
    )
    parser.add_argument("--out", default=str(READMES / "results"), help="folder of the results")
    parser.add_argument(
        "--tune", action="store_true", help="only measure the block sizes of our kernels and write the best into llm"
    )
    parser.add_argument("--widths", default="64,128,256", help="head widths for --tune")
    parser.add_argument("--readme", action="store_true", help="only rewrite the section of benchmarks/README.md")
    flags = parser.parse_args(argv)
    if flags.repeats < 3:
        raise InputError(f"--repeats={flags.repeats}: a spread needs at least 3 rounds")
    return flags


def _words(values: list[str]) -> list[str]:
    return [word.strip() for value in values for word in value.split(",") if word.strip()]


def _width(word: str) -> int:
    if not word.isdecimal() or not 0 < int(word) <= 256:
        raise InputError(f"--widths: {word!r} is no head width from 1 to 256")
    return int(word)


def _chosen(names: list[str]) -> list[Implementation]:
    """Those named, or all. The names of peers hold blanks; on a command line they may be written with dashes."""
    known = all_implementations()
    dashed = {name.replace(" ", "-"): name for name in known}
    for name in names:
        if name not in known and name not in dashed:
            raise InputError(f"--implementations: there is no {name!r}; there are {', '.join(dashed)}")
    wanted = {dashed.get(name, name) for name in names}
    return [each for name, each in known.items() if not wanted or name in wanted]


def _command(argv: list[str]) -> str:
    """The command that makes these rows again, without where it wrote them."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["python", "-m", "benchmarks.attention", *kept])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device) -> tuple[str, str]:
    """The device's name for people and for files."""
    name = device.device_kind
    if device.platform == "cpu":
        model = platform.processor() or platform.machine()
        info = pathlib.Path("/proc/cpuinfo")
        if info.exists():
            found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
            model = found[1].strip() if found else model
        name = f"{model}, {os.cpu_count()} cores"
    return name, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- checking and timing ----------------------------------------------------------------------------------------------


def measure(
    case: Case, dtype: str, implementations: list[Implementation], repeats: int | None, run: dict
) -> tuple[list[dict], list[str]]:
    """Rows of one case, both passes, and what gave wrong numbers. With `repeats` None nothing is timed."""
    on_cpu = jax.devices()[0].platform == "cpu"
    print(f"\n{case}")
    inputs = make_inputs(case, dtype)
    expected = oracle(case, inputs)
    rows, wrong = [], []
    for name_of_pass in PASSES[: 2 if case.backward else 1]:
        backward = name_of_pass != "forward"
        ready: dict[str, tuple[Implementation, Prepared, float]] = {}
        for each in implementations:
            most = SCORES_ON_CPU if on_cpu else SCORES
            reason = each.lacks(case, dtype, backward)
            if each.whole_scores and case.score_bytes() > most:
                reason = f"would hold {case.score_bytes() / 2**30:.1f} GiB of scores, the bound is {most / 2**30:.0f}"
            if reason is None:
                try:
                    prepared = each.prepare(case, inputs, dtype, backward)
                    results = prepared.fetch(prepared.wait(prepared.dispatch()))
                except Exception as error:
                    # Whatever a peer dies of is its own; of ours only a refusal is expected.
                    if each.ours and not isinstance(error, NotImplementedError):
                        raise
                    reason = one_line(error)
                else:
                    errors = check(results, expected)
                    shown = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
                    if not all(error <= tolerance(dtype, on_cpu) for error in errors.values()):
                        wrong.append(f"{each.name} in {name_of_pass} of {case}: {shown}")
                        print(f"  {name_of_pass}: {each.name} WRONG: {shown}, at most {tolerance(dtype, on_cpu):.0e}")
                        continue
                    ready[each.name] = each, prepared, max(errors.values())
                    if repeats is None:
                        print(f"  {name_of_pass}: {each.name} agrees with the oracle: {shown}")
            if reason is not None:
                print(f"  {name_of_pass}: left out: {each.name} {reason}")
        if repeats is not None and ready:
            new = _rows(case, dtype, name_of_pass, ready, clock({n: p for n, (_, p, _) in ready.items()}, repeats), run)
            attention_report.print_rows(new)
            rows += new
    return rows, wrong


def clock(ready: dict[str, Prepared], repeats: int) -> dict[str, list[float]]:
    """Seconds of one call in each round. A call that is short is repeated in its round and divided."""
    on_cpu = jax.devices()[0].platform == "cpu"

    def calls(prepared: Prepared, count: int) -> float:
        # Threads of the peer before stay awake a while on a CPU, waiting for more; they must not take our cores.
        time.sleep(0.005 if on_cpu else 0)
        start = time.perf_counter()
        results = None
        for _ in range(count):
            results = prepared.dispatch()
            if on_cpu:  # an accelerator runs its queue one by one, a CPU several calls at once
                prepared.wait(results)
        prepared.wait(results)
        return (time.perf_counter() - start) / count

    counts = {name: max(1, min(50, round(0.005 / calls(prepared, 1)))) for name, prepared in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    began = time.perf_counter()
    for n in range(repeats):
        for name, prepared in ready.items():
            times[name].append(calls(prepared, counts[name]))
        if n >= 2 and (time.perf_counter() - began) * (n + 2) / (n + 1) > SECONDS:
            break
    return times


def _rows(case: Case, dtype: str, name_of_pass: str, ready: dict, times: dict[str, list[float]], run: dict):
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    base = medians.get(attention_report.baseline(medians))
    backward = name_of_pass != "forward"
    flops, moved = case.flops(backward), case.least_bytes(backward, dtype)
    rows = []
    for name, (each, prepared, error) in ready.items():
        seconds = medians[name]
        low, _, high = statistics.quantiles(times[name], n=4)
        peak = prepared.peak_bytes()
        reading = case.T < case.S and not case.backward
        rows.append({
            "shape": str(case), "dtype": dtype, "implementation": name, "pass": name_of_pass,
            "ours": each.ours, "length": case.S,
            "median_ms": 1e3 * seconds, "spread_ms": 1e3 * (high - low), "rounds": len(times[name]),
            "tflops": flops / seconds / 1e12, "of_matrix_ceiling": flops / seconds / 1e12 / run["matrix_tflops"],
            "least_bytes": moved, "gb_s": moved / seconds / 1e9,
            "of_read_ceiling": moved / seconds / 1e9 / run["read_gb_s"] if reading else None,
            "peak_bytes": peak, "time_to_baseline": None if base is None else seconds / base,
            "largest_error": error,
        })  # fmt: skip
    return rows


# --- ceilings ---------------------------------------------------------------------------------------------------------


def _best(f: Callable, *arguments, repeats: int = 5) -> float:
    jax.block_until_ready(f(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matrix_ceiling(dtype: str, on_cpu: bool) -> float:
    """TFLOP/s of the best of some large products."""
    best = 0.0
    for n in (1024, 2048, 3072) if on_cpu else (4096, 8192, 16384):
        x = jnp.ones((n, n), dtype)
        best = max(best, 2 * n**3 / _best(jax.jit(jnp.matmul), x, x) / 1e12)
    return best


def read_ceiling(on_cpu: bool) -> float:
    """GB/s of reading an array far larger than any cache: on a CPU each core sums its own part of it."""
    if not on_cpu:
        x = jnp.ones(2**29, jnp.float32)
        return x.nbytes / _best(jax.jit(jnp.sum), x) / 1e9
    parts = np.split(np.ones(2**26 * (os.cpu_count() or 1), np.float32), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        seconds = min(_best(lambda f=f: list(pool.map(f, parts))) for f in (np.sum, np.max))
    return sum(part.nbytes for part in parts) / seconds / 1e9


if __name__ == "__main__":
    cli.run(main)
