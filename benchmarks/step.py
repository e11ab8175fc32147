"""Tokens a second of our train step against the same model in torch, in one run, alternating.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.step [--preset=7m|30m|quickstart] [--compile] [--plain]

Both hold the same GPT (learned positions, layer norm, tanh GELU, no biases) with the same parameters, float32,
AdamW and clipping at 1. Before anything is timed, their losses and gradient norms must agree to 1e-3. Rounds alternate
between them; the figures are medians over rounds. Also shows where our step's time goes, forward, gradient, update, and
how much fresh memory it takes; --plain times it with JAX's own gradient of products (`llm/nn/matmul.py`) as well.
Writes benchmarks/results/step-<preset>.json.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm import sharding
from llm.data.objectives import causal
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.nn import projection
from llm.training import losses, optimizer, state
from llm.training.spec import OptimizerSpec
from llm.training.step import compile_train_step, put_batch

COMMON = {"position": "learned", "norm": "layer", "norm_epsilon": 1e-5, "activation": "gelu_tanh"}
PRESETS = {
    "7m": (GPTSpec(8192, 256, layers=4, width=256, heads=4, unroll=4, tied=False, **COMMON), 8),
    "30m": (GPTSpec(16384, 256, layers=6, width=448, heads=7, unroll=6, tied=False, **COMMON), 4),
    "quickstart": (GPTSpec(4096, 128, layers=4, width=128, heads=4, unroll=4, **COMMON), 8),
}
Step = Callable[[], tuple[float, float]]  # runs one update, returns its loss and gradient norm
OPTIMIZER = OptimizerSpec(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1)


def ours(spec: GPTSpec, batch: dict) -> tuple[Step, dict, dict[str, Callable]]:
    """(one step, the initial parameters in numpy, the step's parts to time on their own)."""
    mesh = sharding.make_mesh(sharding.MeshSpec())
    model = build(spec)
    jax.set_mesh(mesh)
    opt = optimizer.build(OPTIMIZER, 1000)
    recipe = state.Recipe(model, opt)
    current = state.create(recipe, mesh)
    initial = jax.device_get(current.params)
    loss = losses.next_token(model, None)
    step = compile_train_step(
        mesh, state.state_shardings(recipe, mesh), loss=loss, optimizer=opt,
        schedule=optimizer.schedule(OPTIMIZER, 1000), clip_norm=1.0,
    )  # fmt: skip
    placed = put_batch(mesh, batch)
    params = jax.tree.map(jnp.asarray, initial)

    def mean(p, b):
        total, weight = loss(p, b)["loss"]
        return total / weight

    forward, gradient = jax.jit(mean), jax.jit(jax.value_and_grad(mean))
    gradients = gradient(params, placed)[1]
    moments = opt.init(params)
    update = jax.jit(lambda g, m, p: opt.update(optimizer.clip_by_norm(g, optax.tree.norm(g), 1.0), m, p))
    parts = {
        "forward": lambda: forward(params, placed),
        "forward + backward": lambda: gradient(params, placed),
        "clip + AdamW": lambda: update(gradients, moments, params),
    }

    def run() -> tuple[float, float]:
        nonlocal current
        current, metrics = step(current, placed)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return run, initial, parts


def theirs(spec: GPTSpec, batch: dict, initial: dict, compiled: bool) -> Step:
    """The same model and step in torch, as its users write it: eager, or through torch.compile."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    D, N = spec.width, spec.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(D, eps=1e-5) for _ in range(2))
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (y.view(B, T, N, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Embedding(spec.vocab_size or 0, D), nn.Embedding(spec.context, D)
            self.blocks = nn.ModuleList(Block() for _ in range(spec.layers))
            self.norm = nn.LayerNorm(D, eps=1e-5)
            self.unembed = nn.Linear(D, spec.vocab_size or 0, bias=False)
            if spec.tied:
                self.unembed.weight = self.embed.weight

        def forward(self, tokens, targets):
            x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = self.unembed(self.norm(x))
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    model = Model()
    layers = initial["stack"]["layers"]

    def put(parameter, value):
        parameter.data.copy_(torch.from_numpy(np.array(value, np.float32)).reshape(parameter.shape))

    put(model.embed.weight, initial["embed"]["table"])
    put(model.position.weight, initial["embed_position"]["table"])
    put(model.norm.weight, initial["final_norm"]["scale"])
    put(model.norm.bias, initial["final_norm"]["bias"])
    if not spec.tied:
        put(model.unembed.weight, initial["unembedding_projection"]["kernel"].T)
    for n, block in enumerate(model.blocks):
        a, m = layers["attention"], layers["mlp"]
        qkv = [a[name]["kernel"][n].reshape(D, D).T for name in ("query", "key", "value")]
        put(block.qkv.weight, np.concatenate(qkv))
        put(block.out.weight, a["output"]["kernel"][n].reshape(D, D).T)
        put(block.up.weight, m["up"]["kernel"][n].T)
        put(block.down.weight, m["down"]["kernel"][n].T)
        for norm, name in ((block.norm1, "attention_norm"), (block.norm2, "mlp_norm")):
            put(norm.weight, layers[name]["scale"][n])
            put(norm.bias, layers[name]["bias"][n])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    f = torch.compile(model) if compiled else model
    tokens, targets = (torch.from_numpy(batch[k].astype(np.int64)) for k in ("tokens", "targets"))

    def run() -> tuple[float, float]:
        opt.zero_grad(set_to_none=True)
        loss = f(tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        return float(loss.detach()), float(norm)

    return run


def faults(f: Callable) -> int:
    """Pages of fresh memory that the system gives this process during a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(f())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def clock(f: Callable, repeats: int) -> float:
    """Seconds of one call, the mean of a few."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(f())
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Checks, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="7m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile too (half a minute, needs a compiler)"
    )
    parser.add_argument("--plain", action="store_true", help="time our step with JAX's own gradient of products too")
    flags = parser.parse_args()
    spec, rows = PRESETS[flags.preset]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, spec.vocab_size or 0, (rows, spec.context + 1))
    batch = causal(tokens[:, :-1], tokens[:, 1:], np.ones((rows, spec.context), np.int32))

    step, initial, parts = ours(spec, batch)
    peers = {"llm": step, "torch eager": theirs(spec, batch, initial, compiled=False)}
    first: dict[str, tuple[float, float]] = {}
    if flags.plain:
        name = "llm, plain products"
        with mock.patch.object(projection, "matmul", jnp.matmul):
            peers[name] = ours(spec, batch)[0]
            first[name] = peers[name]()  # which traces it
    if flags.compile:
        peers["torch.compile"] = theirs(spec, batch, initial, compiled=True)
    first |= {name: run() for name, run in peers.items() if name not in first}
    for name, values in first.items():
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(values, first["llm"])):
            raise SystemExit(
                f"{name} does not compute what llm computes: {values} and {first['llm']}; nothing is timed"
            )

    times: dict[str, list[float]] = {name: [] for name in peers}
    for run in (*peers.values(), *parts.values()):
        clock(run, 2)
    for _ in range(flags.rounds):
        for name, run in peers.items():
            times[name].append(clock(run, flags.steps))
    count = rows * spec.context
    result = {
        "preset": flags.preset,
        "parameters": state.count_parameters(initial),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "tokens_per_second": {n: round(count / statistics.median(t)) for n, t in times.items()},
        "spread": {n: f"{count / max(t):.0f}-{count / min(t):.0f}" for n, t in times.items()},
        "ratio_to_torch_eager": round(statistics.median(times["torch eager"]) / statistics.median(times["llm"]), 3),
        "page_faults_of_a_step": faults(step),
        "parts_ms": {n: round(1e3 * statistics.median(clock(f, 1) for _ in range(9)), 1) for n, f in parts.items()},
        "spec": dataclasses.asdict(spec),
    }
    path = pathlib.Path(__file__).parent / "results" / f"step-{flags.preset}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "spec"}, indent=2))


if __name__ == "__main__":
    main()
