"""Prefill and decoding of SmolLM2-135M: ours against llama.cpp (the same GGUF) and transformers, in one run.

    pip install -r benchmarks/requirements.txt
    python -m tests.weights.fetch smollm2
    python -m benchmarks.decode [--rounds=3] [--batches=1,4,16,64] [--forms=float32,int8,...] [--peers=none]

One prompt of 128 tokens and 128 new ones, greedy, two threads; rounds alternate between all of them and the figures are
medians. Ours are timed where a user meets them: `llm.generation.complete` with what `llm.generate` gives it; the first
token ends the prefill. The file is taken in once as a run, into --workdir, and exported from there for transformers.
Before anything is timed, float32 of ours and of transformers must draw the same 16 tokens, and llama.cpp's first.

Also: the products of a token by themselves, one after the other, in what a step takes; bytes that a token reads
(weights, and half of the cache's room of 256), the machine's read bandwidth (the best of a matrix-vector product over
453 MB and of numpy's sum in two threads), and the share of it that decoding reaches; the curve of batches; and the time
from a cold process to its first character with a warm compilation cache. Peers that are not installed are left out by
name. Writes benchmarks/results/decode.json.
"""

import argparse
import importlib.util
import json
import lzma
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm import data, models
from llm.compression.packing import pack_params
from llm.data import cache
from llm.generation import SamplingSpec, complete
from llm.nn import native
from llm.nn.packed import Packed, product
from llm.run_folder import Run, open_run

PROMPT, NEW, THREADS = 128, 128, 2
GGUF = "weights/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMS = ("float32", "float32 scanned", "int8", "int8 by XLA", "int4", "int4 by XLA")
Engine = Callable[[list[int], int], tuple[list[int], float, float]]  # tokens drawn, seconds of prefill and of the rest


class Ours:
    """A form of the weights; rows of a batch are the same prompt turned by some tokens."""

    def __init__(self, run: Run, form: str):
        model, params = run.model, run.params
        bits = {"int8": 8, "int4": 4}.get(form.split()[0])
        if bits is not None:
            by_kernel = "XLA" not in form
            missing = native.load(cache.folder() / "kernels") if by_kernel else None
            if missing:
                raise SystemExit(f"{form}: {missing}")
            params = pack_params(model, params, bits, native=by_kernel).params
        self.weights = sum(x.nbytes for x in jax.tree.leaves(params))
        if "scanned" not in form:
            model, params = models.unrolled(model, params)
        self.model, self.params, self.run = model, params, run

    def rows(self, prompt: list[int], new: int, batch: int = 1) -> tuple[list[int], float, float]:
        """What the first row drew, and the seconds to the first token and of the others."""
        at: list[float] = []

        def on_token(row: int, token: int) -> None:
            if row == batch - 1:
                at.append(time.perf_counter())

        prompts = [prompt[n:] + prompt[:n] for n in range(batch)]
        begun = time.perf_counter()
        found = complete(
            self.model, self.params, prompts, new, SamplingSpec(temperature=0.0), context=self.run.model.spec.context,
            vocab_size=self.run.tokenizer.vocab_size, end_of_text=None, on_token=on_token,
        )  # fmt: skip
        return found[0].tokens, at[0] - begun, at[-1] - at[0]

    def cache_bytes(self, room: int) -> int:
        """Bytes of a row's keys and values."""
        shapes = jax.eval_shape(lambda: self.model.init_cache(1, room).layers)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def llama_cpp(path: pathlib.Path) -> Engine:
    """llama.cpp with the file as it is."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    model = Llama(str(path), n_ctx=PROMPT + NEW + 8, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def run(prompt: list[int], new: int):
        model.reset()
        begun, drawn = time.perf_counter(), []
        model.eval(prompt)
        drawn.append(model.sample(temp=0.0))
        first = time.perf_counter()
        for _ in range(new - 1):
            model.eval([drawn[-1]])
            drawn.append(model.sample(temp=0.0))
        return drawn, first - begun, time.perf_counter() - first

    return run


def transformers(folder: pathlib.Path, dtype: str) -> Engine:
    """The exported folder in torch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(prompt: list[int], new: int):
        with torch.inference_mode():
            begun = time.perf_counter()
            out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            drawn = [int(out.logits[0, -1].argmax())]
            first = time.perf_counter()
            for _ in range(new - 1):
                out = model(torch.tensor([[drawn[-1]]]), past_key_values=out.past_key_values, use_cache=True)
                drawn.append(int(out.logits[0, -1].argmax()))
        return drawn, first - begun, time.perf_counter() - first

    return run


def products(one: Ours, packed: Ours) -> float:
    """Milliseconds of a token's matrix products by themselves, each waiting for the one before; median of 20.

    Args:
        one: the form, unrolled.
        packed: an unrolled form of the same run that is packed, which says how its matrices lie.
    """
    matrices, shapes = [], []
    theirs = jax.tree.leaves(packed.params, is_leaf=lambda x: isinstance(x, Packed))
    mine = jax.tree.leaves(one.params, is_leaf=lambda x: isinstance(x, Packed))
    for x, like in zip(mine, theirs, strict=True):
        if isinstance(like, Packed):
            layered = like.values.ndim == 4
            if isinstance(x, Packed):
                matrices.append(x[0] if layered else x)
            else:
                matrices.append(x.reshape(like.shape[1], like.shape[0]) if layered else x.T)
            shapes.append(like.shape)

    @jax.jit
    def run(matrices):
        kept = 1.0
        for x, (_, inputs) in zip(matrices, shapes):
            row = jnp.full((1, inputs), kept)
            y = product(row, x) if isinstance(x, Packed) else row @ x
            kept = 1.0 + 1e-9 * y[0, 0]
        return kept

    run(matrices).block_until_ready()
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        run(matrices).block_until_ready()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def bandwidth() -> float:
    """GB/s that the machine reads."""
    matrix, row = jnp.ones((49152, 2304)), jnp.ones((2304,))
    product = jax.jit(lambda m, r: m @ r)
    values = np.ones(64_000_000, np.float32)
    halves = np.array_split(values, THREADS)

    def sums():
        threads = [threading.Thread(target=half.sum) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def best(work, nbytes: int) -> float:
        times = []
        for _ in range(6):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        return nbytes / min(times) / 1e9

    return max(best(lambda: product(matrix, row).block_until_ready(), matrix.nbytes), best(sums, values.nbytes))


def first_character(workdir: pathlib.Path, *flags: str) -> float:
    """Seconds from the start of a process to the first character after the prompt, its programs compiled before."""
    prompt = "The capital of France is"
    command = [sys.executable, "-m", "llm.generate", f"--workdir={workdir}", f"--prompt={prompt}", "--temperature=0",
               "--max-tokens=8", *flags]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(len(prompt) + 1)
        seconds = time.perf_counter() - begun
        process.communicate()
    return seconds


def taken_in(workdir: pathlib.Path, gguf: pathlib.Path) -> tuple[Run, pathlib.Path]:
    """The run of the file, and the folder that it is exported to; both are made where they are missing."""
    exported = workdir.with_name(f"{workdir.name}-hf")
    verb = [sys.executable, "-m", "llm.convert", f"--workdir={workdir}"]
    if not workdir.is_dir():
        subprocess.run([*verb, f"--from={gguf}"], check=True)
    if not exported.is_dir():
        subprocess.run([*verb, f"--to={exported}"], check=True)
    return open_run(str(workdir)), exported


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/smollm2")
    parser.add_argument("--gguf", default=str(cache.folder() / GGUF))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--out", default="benchmarks/results/decode.json")
    flags = parser.parse_args()
    workdir, gguf = pathlib.Path(flags.workdir), pathlib.Path(flags.gguf)
    run, exported = taken_in(workdir, gguf)
    forms = flags.forms.split(",")
    batches = [int(n) for n in flags.batches.split(",") if n]
    text = lzma.decompress(
        (pathlib.Path(data.__file__).parent / "corpora" / "austen" / "persuasion.txt.xz").read_bytes()
    ).decode("utf-8")[:4000]
    prompt = run.tokenizer.encode(text)[:PROMPT]
    jax.set_mesh(run.mesh)

    ours = {form: Ours(run, form) for form in forms}
    engines: dict[str, Engine] = {f"llm {form}": one.rows for form, one in ours.items()}
    left_out = []
    for name, package, make in (
        ("llama.cpp Q4_1", "llama_cpp", lambda: llama_cpp(gguf)),
        ("transformers float32", "transformers", lambda: transformers(exported, "float32")),
        ("transformers bfloat16", "transformers", lambda: transformers(exported, "bfloat16")),
    ):
        if flags.peers == "none" or importlib.util.find_spec(package) is None:
            left_out.append(name)
        else:
            engines[name] = make()

    drawn = {name: engine(prompt, 16)[0] for name, engine in engines.items()}  # compiles, too
    if "llm float32" in drawn and "transformers float32" in drawn:
        assert drawn["llm float32"] == drawn["transformers float32"], drawn
    if "llm float32" in drawn and "llama.cpp Q4_1" in drawn:
        assert drawn["llm float32"][0] == drawn["llama.cpp Q4_1"][0], drawn
    for engine in engines.values():
        engine(prompt, NEW)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(flags.rounds):
        for name, engine in engines.items():
            times[name].append(engine(prompt, NEW)[1:])
    read = bandwidth()
    rows: list[dict[str, Any]] = []
    packed = next((one for form, one in ours.items() if form.startswith("int")), None)
    for name, found in times.items():
        prefill, rest = (statistics.median(seconds) for seconds in zip(*found))
        row = {"engine": name, "prefill": PROMPT / prefill, "decode": (NEW - 1) / rest}
        row["step_ms"] = 1000 / row["decode"]
        if name.startswith("llm "):
            one = ours[name.removeprefix("llm ")]
            row["bytes_per_token"] = one.weights + one.cache_bytes(256) // 2
            if "scanned" not in name and packed is not None:
                row["products_ms"] = products(one, packed)
            row["share_of_bandwidth"] = row["bytes_per_token"] * row["decode"] / (read * 1e9)
        rows.append(row)
        print(json.dumps(row))
    curve = []
    for form in [form for form in forms if form in ("float32", "int8", "int4")]:
        for batch in batches:
            ours[form].rows(prompt, 4, batch)
            _, _, rest = ours[form].rows(prompt, 32, batch)
            curve.append({"form": form, "batch": batch, "decode": batch * 31 / rest})
            print(json.dumps(curve[-1]))
    del engines, ours
    cold = {form: first_character(workdir, *more) for form, more in
            (("float32", ()), ("int8", ("--weights=int8",)), ("int4", ("--weights=int4",)))}  # fmt: skip
    print(f"read bandwidth {read:.1f} GB/s; seconds to the first character: {cold}; left out: {left_out}")
    result = {
        "machine": platform.processor() or platform.machine(), "threads": THREADS, "jax": jax.__version__,
        "prompt": PROMPT, "new": NEW, "rounds": flags.rounds, "read_bandwidth_gb_s": read, "rows": rows,
        "batches": curve, "seconds_to_first_character": cold, "left_out": left_out,
    }  # fmt: skip
    pathlib.Path(flags.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
