"""The implementations that benchmarks.attention can run: our own and its peers. Peers are imported when they are used.

Every one takes and gives (batch, length, heads, width), the layout that a projection gives; transposes that a peer
needs are inside what is timed. Each says in one line why it does not run here or lacks a feature of a case.
"""

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases import Case, Inputs
from llm.attention import Mask, api, attention

NAMES = ("out", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One implementation, ready to be called: compiled, its inputs on the device."""

    dispatch: Callable[[], Any]  # starts one call
    wait: Callable[[Any], Any]  # until its results are there
    fetch: Callable[[Any], dict[str, np.ndarray]]  # out, dq, dk, dv in float32
    peak_bytes: Callable[[], int | None]  # above the inputs, results included; None where it cannot be known


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`not_here(platform)` and `lacks(case, dtype, backward)` give a reason, or None when it runs."""

    name: str
    ours: bool
    not_here: Callable[[str], str | None]
    lacks: Callable[[Case, str, bool], str | None]
    prepare: Callable[[Case, Inputs, str, bool], Prepared]
    whole_scores: bool = False  # holds the matrix of scores


def all_implementations() -> dict[str, Implementation]:
    """By name, our own first; nothing is imported yet."""
    found = [_ours(name) for name in ("auto", *api.IMPLEMENTATIONS)]
    found += [
        Implementation("jax.nn xla", False, _anywhere, _nothing, _jax(_jax_nn("xla")), whole_scores=True),
        Implementation("jax.nn cudnn", False, _only("gpu"), _cudnn_lacks, _jax(_jax_nn("cudnn"))),
        Implementation("tokamax xla", False, _tokamax_on(), _nothing, _jax(_tokamax("xla")), whole_scores=True),
        Implementation("tokamax xla_chunked", False, _tokamax_on(), _nothing, _jax(_tokamax("xla_chunked"))),
        Implementation("tokamax mosaic_gpu", False, _tokamax_on("gpu"), _nothing, _jax(_tokamax("mosaic_gpu"))),
        Implementation("tokamax triton", False, _tokamax_on("gpu"), _nothing, _jax(_tokamax("triton"))),
        Implementation("tokamax mosaic_tpu", False, _tokamax_on("tpu"), _nothing, _jax(_tokamax("mosaic_tpu"))),
        Implementation("pallas mosaic_gpu", False, _only("gpu"), _pallas_mosaic_lacks, _jax(_pallas_mosaic)),
        Implementation("pallas triton", False, _only("gpu"), _pallas_triton_lacks, _jax(_pallas_triton)),
        Implementation("pallas triton decode", False, _only("gpu"), _pallas_decode_lacks, _jax(_pallas_decode)),
        Implementation("pallas tpu flash", False, _only("tpu"), _tpu_flash_lacks, _jax(_tpu_flash)),
        Implementation("pallas tpu splash", False, _only("tpu"), _tpu_splash_lacks, _jax(_tpu_splash)),
        Implementation("torch sdpa", False, _torch_not_here, _nothing, _torch(_sdpa)),
        Implementation("flash-attention 3", False, _fa3_not_here, _fa3_lacks, _torch(_fa3)),
    ]
    return {each.name: each for each in found}


def _first(reasons: dict[str, bool]) -> str | None:
    return next((reason for reason, applies in reasons.items() if applies), None)


def _anywhere(platform: str) -> str | None:
    return None


def _nothing(case: Case, dtype: str, backward: bool) -> str | None:
    return None


def _only(wanted: str) -> Callable[[str], str | None]:
    return lambda platform: None if platform == wanted else f"runs on {wanted}, the platform here is {platform}"


def _missing(module: str, install: str) -> str | None:
    """Why a module cannot be imported."""
    if importlib.util.find_spec(module) is None:
        return f"not installed ({install})"
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer's own import may fail in any way, and none of them is our failure
        return f"installed, but its import fails: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """An exception of a peer, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


# --- in jax -----------------------------------------------------------------------------------------------------------


def _jax(call: Callable) -> Callable[[Case, Inputs, str, bool], Prepared]:
    """Compiles `call(case, q, k, v, extras)` with what the case has besides q, k, v as arguments, not constants."""

    def prepare(case: Case, inputs: Inputs, dtype: str, backward: bool) -> Prepared:
        def forward(q, k, v, dout, extras):
            return (call(case, q, k, v, extras),)

        def both(q, k, v, dout, extras):
            out, pull = jax.vjp(lambda *qkv: call(case, *qkv, extras), q, k, v)
            return out, *pull(dout.astype(out.dtype))

        device = jax.devices()[0]
        put = lambda x, as_dtype=None: jax.device_put(jnp.asarray(x, as_dtype), device)  # noqa: E731
        q, k, v, dout = (put(x, dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        extras = {"bias": inputs.bias, "lengths": inputs.lengths, "seen": inputs.seen}
        if inputs.seen is not None:
            extras["q_positions"] = case.q_positions()
        extras = {name: put(x) for name, x in extras.items() if x is not None}
        arguments = q, k, v, dout, extras
        compiled = jax.jit(both if backward else forward).lower(*arguments).compile()

        def peak_bytes() -> int | None:
            memory = compiled.memory_analysis()
            return None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes

        return Prepared(
            dispatch=lambda: compiled(*arguments),
            wait=jax.block_until_ready,
            fetch=lambda results: {name: np.asarray(x, np.float32) for name, x in zip(NAMES, results)},
            peak_bytes=peak_bytes,
        )

    return prepare


def _ours(name: str) -> Implementation:
    def call(case: Case, q, k, v, extras):
        lengths, positions = extras.get("lengths"), extras.get("q_positions")
        mask = Mask(causal=case.hides, kv_lengths_B=lengths, q_positions_BT=positions)
        return attention(q, k, v, mask=mask, bias=extras.get("bias"), scale=case.scale, implementation=name)

    def not_here(platform: str) -> str | None:
        if name == "auto" and platform == "cpu":
            return "is blockwise on a CPU"
        return None if name == "auto" else api.why_not_here(name)

    return Implementation(name, True, not_here, _nothing, _jax(call), whole_scores=name == "reference")


def _jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable:
    def call(case: Case, q, k, v, extras):
        lengths = extras.get("lengths")
        queries = None
        if lengths is not None and implementation == "cudnn":  # which wants both lengths or none
            queries = jnp.full_like(lengths, case.T)
        return jax.nn.dot_product_attention(
            q, k, v, extras.get("bias"), extras.get("seen"), scale=case.scale,
            is_causal=case.hides and case.square,
            query_seq_lengths=queries, key_value_seq_lengths=lengths, implementation=implementation,
        )  # fmt: skip

    return call


def _cudnn_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({f"takes half precision, not {dtype}": dtype == "float32", "H % 8 is not 0": case.H % 8 != 0})


def _tokamax_on(platform: str | None = None) -> Callable[[str], str | None]:
    def not_here(here: str) -> str | None:
        wrong = None if platform is None else _only(platform)(here)
        wrong = wrong or _missing("tokamax", "pip install -r benchmarks/requirements.txt")
        if wrong is None:
            flags: Any = importlib.import_module("absl.flags")
            # Its options are absl flags, which on first use read our command line and refuse it.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS(["benchmarks.attention"])
        return wrong

    return not_here


def _tokamax(implementation: str) -> Callable:
    def call(case: Case, q, k, v, extras):
        tokamax: Any = importlib.import_module("tokamax")
        return tokamax.dot_product_attention(
            q, k, v, extras.get("bias"), extras.get("seen"), scale=case.scale,
            is_causal=case.hides and case.square, key_value_seq_lengths=extras.get("lengths"),
            implementation=implementation,
        )  # fmt: skip

    return call


def _scale(case: Case) -> float:
    return case.H**-0.5 if case.scale is None else case.scale


def _pallas_mosaic(case: Case, q, k, v, extras):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=case.hides,
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip
    # The kernel does not scale its scores.
    return attention_mgpu.attention(q * jnp.asarray(_scale(case), q.dtype), k, v, config)


def _pallas_mosaic_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        f"its scratch is float16, the inputs are {dtype}": dtype != "float16",
        "has no bias": case.bias, "has no lengths": case.lengths,
        "lines up the first query with the first key when causal": case.hides and not case.square,
        "has no causal backward": case.hides and backward,
        "needs T and S to be multiples of 128": case.T % 128 != 0 or case.S % 128 != 0,
        "needs H to be a multiple of 64": case.H % 64 != 0,
    })  # fmt: skip


def _pallas_triton(case: Case, q, k, v, extras):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, None, sm_scale=_scale(case), causal=case.hides)


def _pallas_triton_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        "has no grouped heads": case.N != case.K, "has no bias": case.bias, "has no lengths": case.lengths,
        "lines up the first query with the first key when causal": case.hides and not case.square,
        "needs T and S to be multiples of 128": case.T % 128 != 0 or case.S % 128 != 0,
    })  # fmt: skip


def _pallas_decode(case: Case, q, k, v, extras):
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    return gqa(q[:, 0], k, v, kv_seq_len=extras.get("lengths"), sm_scale=_scale(case))[:, None]


def _pallas_decode_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        "takes one query": case.T != 1, "has no backward": backward, "has no bias": case.bias,
        "needs S to be a multiple of 2048": case.S % 2048 != 0,
    })  # fmt: skip


def _tpu_flash(case: Case, q, k, v, extras):
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    bias = extras.get("bias")
    if bias is not None:
        bias = jnp.broadcast_to(bias, (case.B, *bias.shape[1:]))
    segments = None
    if case.lengths:
        seen = (jnp.arange(case.S) < extras["lengths"][:, None]).astype(jnp.int32)
        segments = SegmentIds(q=jnp.ones((case.B, case.T), jnp.int32), kv=seen)
    return flash_attention(q, k, v, bias, segments, causal=case.hides, sm_scale=_scale(case)).swapaxes(1, 2)


def _tpu_flash_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        "has no grouped heads": case.N != case.K,
        "lines up the first query with the first key when causal": case.hides and not case.square,
        "needs T and S to be multiples of 128": case.T % 128 != 0 or case.S % 128 != 0,
    })  # fmt: skip


def _tpu_splash(case: Case, q, k, v, extras):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    one = splash.CausalMask((case.T, case.S)) if case.hides else splash.FullMask((case.T, case.S))
    kernel: Any = splash.make_splash_mha_single_device(splash.MultiHeadMask([one] * case.N))
    q, k, v = ((q * _scale(case)).astype(q.dtype).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    if not case.lengths:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    seen = (jnp.arange(case.S) < extras["lengths"][:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones((case.B, case.T), jnp.int32), kv=seen)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)


def _tpu_splash_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        "has no bias": case.bias,
        "lines up the first query with the first key when causal": case.hides and not case.square,
        "needs T and S to be multiples of 128": case.T % 128 != 0 or case.S % 128 != 0,
    })  # fmt: skip


# --- in torch ---------------------------------------------------------------------------------------------------------


def _torch_not_here(platform: str) -> str | None:
    missing = _missing("torch", "pip install -r benchmarks/requirements.txt")
    if missing or platform == "cpu":
        return missing
    if platform != "gpu":
        return f"runs on a CPU or with CUDA, the platform here is {platform}"
    import torch

    return None if torch.cuda.is_available() else "this torch sees no GPU"


def _torch(call: Callable) -> Callable[[Case, Inputs, str, bool], Prepared]:
    """Eager, as its users call it. On a CPU its peak of memory is not known."""

    def prepare(case: Case, inputs: Inputs, dtype: str, backward: bool) -> Prepared:
        import torch

        on_cpu = jax.devices()[0].platform == "cpu"
        if on_cpu:
            torch.set_num_threads(os.cpu_count() or 1)
        device, kind = ("cpu" if on_cpu else "cuda"), getattr(torch, dtype)
        q, k, v, dout = (
            torch.from_numpy(x).to(device, kind) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
        )  # fmt: skip
        for x in (q, k, v):
            x.requires_grad_(backward)
        f = call(torch, case, inputs, kind, device)

        def dispatch():
            if not backward:
                with torch.no_grad():
                    return (f(q, k, v),)
            out = f(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), dout)

        def wait(results):
            if not on_cpu:
                torch.cuda.synchronize()
            return results

        def peak_bytes() -> int | None:
            if on_cpu:
                return None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            wait(dispatch())
            return torch.cuda.max_memory_allocated() - before

        def fetch(results):
            return {name: x.detach().float().cpu().numpy() for name, x in zip(NAMES, results)}

        return Prepared(dispatch, wait, fetch, peak_bytes)

    return prepare


def _sdpa(torch: Any, case: Case, inputs: Inputs, kind: Any, device: str) -> Callable:
    mask, causal = None, case.hides and case.square
    if inputs.seen is not None:
        mask, causal = torch.from_numpy(inputs.seen), False
    elif case.lengths:
        mask = torch.arange(case.S)[None, :] < torch.from_numpy(case.length_of_rows())[:, None]
        mask = mask[:, None, None, :]
        if causal:  # SDPA takes a mask or is_causal, not both
            mask, causal = mask & torch.ones(case.T, case.S, dtype=torch.bool).tril(), False
    if inputs.bias is not None:
        bias = torch.from_numpy(inputs.bias)
        if causal:
            mask, causal = torch.ones(case.T, case.S, dtype=torch.bool).tril(), False
        mask = bias.to(kind) if mask is None else bias.masked_fill(~mask, float("-inf")).to(kind)
    mask = None if mask is None else mask.to(device)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def f(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sdpa(q, k, v, mask, is_causal=causal, scale=case.scale, enable_gqa=case.N != case.K)
        return out.transpose(1, 2)

    return f


def _fa3_not_here(platform: str) -> str | None:
    return (
        _only("gpu")(platform)
        or _missing("flash_attn_interface", "build FlashAttention's hopper folder")
        or _torch_not_here(platform)
    )


def _fa3_lacks(case: Case, dtype: str, backward: bool) -> str | None:
    return _first({
        f"takes half precision, not {dtype}": dtype == "float32", "has no bias": case.bias,
        "has lengths without a backward only": case.lengths and backward,
        "lines up the last query with the last key of a row's length": case.lengths and case.square and case.hides,
    })  # fmt: skip


def _fa3(torch: Any, case: Case, inputs: Inputs, kind: Any, device: str) -> Callable:
    fa3: Any = importlib.import_module("flash_attn_interface")
    settings = {"softmax_scale": case.scale, "causal": case.hides}
    lengths = None if inputs.lengths is None else torch.from_numpy(inputs.lengths).to(device)

    def f(q, k, v):
        if lengths is None:
            out = fa3.flash_attn_func(q, k, v, **settings)
        else:
            out = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **settings)
        return out[0] if isinstance(out, tuple) else out  # by version, the log-sum-exp comes with it

    return f
