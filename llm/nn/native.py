"""The compiled form of `llm.nn.packed.product` on CPU: packed_product.cc, built by the machine's own C++ compiler."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

from llm.nn.packed import NATIVE

SOURCE = pathlib.Path(__file__).parent / "packed_product.cc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


@functools.cache
def load(folder: pathlib.Path) -> str | None:
    """Makes the function known to XLA; None, or in a few words why it cannot be.

    It is compiled on first use, some seconds, and kept in `folder` by source, flags, compiler and processor.
    """
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, not for {jax.default_backend()}"
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return f"there is no C++ compiler{f' {named}' if named else ''}: install g++"
    try:
        library = folder / f"packed_product-{_key(compiler)}.so"
        if not library.is_file():
            _compile(compiler, library)
        handler = ctypes.CDLL(str(library)).packed_product
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        found = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        return f"{compiler} could not make it: {found}"
    jax.ffi.register_ffi_target(NATIVE, jax.ffi.pycapsule(handler), platform="cpu")
    return None


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    processor = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    made_of = [SOURCE.read_text(encoding="utf-8"), *FLAGS, jax.__version__, version, platform.machine()]
    return hashlib.sha256("\0".join([*made_of, *processor]).encode()).hexdigest()[:16]


def _compile(compiler: str, library: pathlib.Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: two processes may be at it.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=library.parent) as made:
        part = pathlib.Path(made) / library.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(part)]
        subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        part.replace(library)
