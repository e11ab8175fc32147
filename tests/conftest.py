"""Tests run on CPU, those chosen by `-m gpu` or `-m tpu` on the device, and share JAX's compilation cache."""

import importlib.metadata
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
# Before anything imports jax.
ON_DEVICE = any(mark in argument for argument in sys.argv for mark in ("-mgpu", "-mtpu")) or any(
    flag == "-m" and expression.split()[:1] in (["gpu"], ["tpu"]) for flag, expression in zip(sys.argv, sys.argv[1:])
)
# A worker of pytest-xdist inherits the choice of the process that started it.
if not ON_DEVICE and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The Mosaic GPU interpreter blocks a thread of XLA for every warpgroup that waits; the others need some to go on.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
# Programs here are compiled to run a few times, and compiling takes most of the suite's time. The smokes of `.ci/run`
# are compiled as users' programs are, and so is what takes `tests.quick.optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# XLA would cut each program into up to 32 pieces for LLVM, which on two cores takes nearly twice the time of one piece.
# Without optimizations its older emitters of fused loops compile a program in a quarter of the newer ones' time. They
# are gone from jax 0.11, where the flag is an error.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

import pytest  # noqa: E402

from tests import helpers  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of eight short documents out of the embedded corpus."""
    return helpers.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, corpus) -> pathlib.Path:
    """The folder of one finished tiny run, read by many tests and changed by none."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    result = helpers.verb("train", *helpers.tiny(corpus, workdir))
    assert result.returncode == 0, result.stderr
    return workdir
