"""Compiles the attention kernels for an NVIDIA H100 ahead of time, on a machine without one.

    python -m benchmarks.compile_gpu [--env PATH] [--out results.json] [--only WORD]

It makes a small environment with JAX's CUDA plugin and NVIDIA's assembler (1.3 GB, cached), compiles every kernel in it
to sm_90a, and checks what the assembler says: no register is spilled, the products are wgmma and not serialised, and
shared memory fits. That proves that a kernel compiles and fits; it proves neither numbers nor speed on the device.

Exit code 0: all is well; 1: a kernel fails a check or does not compile; 2: the packages cannot be had, nothing was run.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from typing import cast

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_MEMORY = 232448  # bytes a block of threads may have
MAIN = {"causal": True}
ALL = dict(
    causal=True, window=(1000, None), segments=True, lengths=True, prefixes=True, bias="table", softcap=30.0,
    sinks=True, rate=0.1,
)  # fmt: skip
DENSE = dict(dense=True, bias="array", positions=True)
# (name, head width, query heads, key heads, queries, keys, dtype, backward, features)
CASES = [
    *(
        (f"{kind} {width} {'backward' if backward else 'forward'}", width, 8, 4, 1024, 1024, "bfloat16", backward, what)
        for width in (64, 128, 256)
        for kind, what in (("full", {}), ("causal", MAIN), ("many features", ALL), ("dense mask, bias", DENSE))
        for backward in (False, True)
        if backward or kind != "full"
    ),
    ("float16 causal 128 backward", 128, 8, 4, 1024, 1024, "float16", True, MAIN),
    *((f"decode {width}", width, 16, 4, 1, 4096, "bfloat16", False, {"lengths": True}) for width in (64, 128, 256)),
    ("decode 128, many features", 128, 16, 4, 4, 4096, "bfloat16", False, {**ALL, "rate": 0.0}),
]


def main() -> int:
    """Makes the environment, compiles in it, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--env", type=pathlib.Path, help="folder of the environment, made where it is missing")
    parser.add_argument("--out", type=pathlib.Path, help="writes the figures as JSON")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        _compile(CASES[args.case])
        return 0
    version = metadata.version("jax")
    env = args.env or pathlib.Path.home() / ".cache" / f"llm-cuda-{version}"
    why = _make(env, version)
    if why is not None:
        print(f"packages cannot be had: {why}: not run")
        return 2
    rows, failures = [], []
    for number, case in enumerate(CASES):
        if args.only in case[0]:
            found, why = _run(env, number)
            rows += found
            failures += [f"{case[0]}: {reason}" for reason in why]
    print(_table(rows))
    for failure in failures:
        print(f"FAIL {failure}")
    if args.out:
        args.out.write_text(json.dumps({"jax": version, "kernels": rows, "failures": failures}, indent=1) + "\n")
    return 1 if failures or not rows else 0


def _make(env: pathlib.Path, version: str) -> str | None:
    """Makes the environment; the last line of what went wrong, or None."""
    python = env / "bin" / "python"
    ready = env / "ready"
    if ready.exists() and ready.read_text() == version:
        return None
    try:
        if not python.exists():
            venv.create(env, with_pip=True)
        for packages in (
            [f"jax=={version}", f"jaxlib=={version}", "absl-py"],
            # Without the libraries of CUDA, which no compiler needs.
            ["--no-deps", f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}"],
            ["--no-deps", "nvidia-cuda-nvcc-cu12>=12.9", "nvidia-cuda-runtime-cu12>=12.9"],
        ):
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return (done.stderr.strip() or "pip failed").splitlines()[-1]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error).splitlines()[0]
    ready.write_text(version)
    return None


def _run(env: pathlib.Path, number: int) -> tuple[list[dict], list[str]]:
    """Compiles one case in a process of its own: a row a kernel, and what is wrong."""
    name = CASES[number][0]
    with tempfile.TemporaryDirectory() as dump:
        variables = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",
            "MOSAIC_GPU_DUMP_TO": dump,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PYTHONPATH": str(ROOT),
        }
        variables.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [str(env / "bin" / "python"), "-m", "benchmarks.compile_gpu", "--case", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return [], [f"does not compile: {lines[-1] if lines else done.returncode}"]
        rows = [
            {"case": name, **_read(ptx)}
            for ptx in sorted(pathlib.Path(dump).glob("*.ptx"), key=lambda path: (len(path.name), path.name))
        ]
    wrong = []
    for row in rows:
        if row["spilled bytes"] != 0:
            wrong.append(f"spills {row['spilled bytes']} bytes")
        if row["wgmma"] == 0:
            wrong.append("has no wgmma")
        if row["serialised"]:
            wrong.append("its wgmma is serialised")
        if row["shared memory"] is None or not 0 < row["shared memory"] < SHARED_MEMORY:
            wrong.append(f"shared memory is {row['shared memory']} bytes, the most is {SHARED_MEMORY}")
    return rows, wrong or ([] if rows else ["no kernel was found"])


def _read(ptx: pathlib.Path) -> dict:
    """The figures of one kernel from its PTX and from what ptxas said."""
    said = ptx.with_suffix(".ptxas").read_text()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    registers = re.search(r"Used (\d+) registers", said)
    return {
        "registers": int(registers[1]) if registers else None,
        "spilled bytes": sum(spills) if spills else None,
        "wgmma": ptx.read_text().count("wgmma.mma_async"),
        "serialised": "serializ" in said.lower(),
        "shared memory": _shared_memory(ptx.with_suffix(".mlir-passes.log")),
    }


def _shared_memory(log: pathlib.Path) -> int | None:
    """Bytes that a kernel asks for at its launch; the assembler does not know them."""
    with log.open() as lines:
        for line in lines:
            if found := re.search(r"dynamic_shared_memory_size %c(\d+)", line):
                return int(found[1])
    return None


def _table(rows: list[dict]) -> str:
    columns = ["case", "registers", "spilled bytes", "wgmma", "shared memory"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows])


# --- in the environment -----------------------------------------------------------------------------------------------


def _compile(case) -> None:
    """Compiles one case; what comes of it is in the dump."""
    import importlib

    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from llm.attention import BucketBias, Mask
    from llm.attention.target import compiling_for
    from llm.planning.topology import H100

    ours = importlib.import_module("llm.attention.mosaic_gpu")
    _, width, N, K, T, S, dtype, backward, what = case
    B = 2
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    mask, arrays = {"causal": what.get("causal", False), "window": what.get("window")}, {}
    if what.get("segments"):
        mask |= {"q_segments_BT": array(B, T, dtype="int32"), "kv_segments_BS": array(B, S, dtype="int32")}
    if what.get("positions"):
        mask |= {"q_positions_BT": array(B, T, dtype="int32"), "kv_positions_BS": array(B, S, dtype="int32")}
    if what.get("lengths"):
        mask["kv_lengths_B"] = array(B, dtype="int32")
    if what.get("prefixes"):
        mask["prefix_lengths_B"] = array(B, dtype="int32")
    if what.get("dense"):
        mask["dense_BNTS"] = array(B, N, T, S, dtype="bool")
    if what.get("bias") == "table":
        arrays["bias"] = BucketBias(cast(jax.Array, array(32, N, dtype="float32")))
    elif what.get("bias") == "array":
        arrays["bias"] = array(1, N, T, S)
    if what.get("sinks"):
        arrays["sinks_N"] = array(N, dtype="float32")
    for name, shape in (("q", (B, T, N, width)), ("k", (B, S, K, width)), ("v", (B, S, K, width))):
        arrays[name] = array(*shape)

    def forward(arrays, mask, words):
        given = {"bias": None, "sinks_N": None, **{n: x for n, x in arrays.items() if n not in "qkv"}}
        return ours.mosaic_gpu(
            arrays["q"], arrays["k"], arrays["v"], mask=mask, scale=None, softcap=what.get("softcap"),
            dropout_rate=what.get("rate", 0.0), dropout_words=words, precision=None, **given,
        )  # fmt: skip

    def both(arrays, mask, words, cotangents):
        out, pull = jax.vjp(lambda arrays: forward(arrays, mask, words), arrays)
        return out, pull(cotangents)

    words = array(4, dtype="uint32") if what.get("rate") else None
    args = [arrays, Mask(**mask), words]
    if backward:
        args.append((array(B, T, N, width), array(B, T, N, dtype="float32")))
    with compiling_for("gpu", "NVIDIA H100 80GB HBM3", capability="9.0"):
        lowered = jax.jit(both if backward else forward).trace(*args).lower(lowering_platforms=("cuda",))
    lowered.compile()


if __name__ == "__main__":
    sys.exit(main())
