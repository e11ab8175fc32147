"""What benchmarks.attention measures: cases, their inputs, their least costs, and the float64 oracle of their results.

The oracle is numpy, works through blocks of query rows and shares no code with llm.attention. For every batch row and
key head it gives the output and dq of a sample of query rows spread over the length; for as many pairs of batch row and
key head as fit a budget of scores (always the last pair), it gives every row, dk and dv too.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from llm.errors import InputError

ORACLE_SCORES = 2**26  # scores of the pairs of batch row and key head that the oracle computes whole
SAMPLED_ROWS = 16
# Largest error of a row of H numbers against the size of the row, see `check`. Float32 on an accelerator is
# TensorFloat-32 or bfloat16 inside its matrix units unless one asks for more, and nobody trains with more.
TOLERANCE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}
TOLERANCE_OF_FLOAT32_ON_ACCELERATOR = 2e-2
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. With `lengths`, row b has only its first lengths[b] keys; with fewer queries than keys, the queries
    are the last ones of those, as when generating from a cache.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = False
    bias: bool = False
    lengths: bool = False
    scale: float | None = None
    backward: bool = True

    def __str__(self) -> str:
        words = [f"{axis}{getattr(self, axis)}" for axis in "BTSNKH"]
        words += [word for word in ("causal", "bias", "lengths") if getattr(self, word)]
        return " ".join(words + ([] if self.scale is None else [f"scale={self.scale:g}"]))

    @property
    def hides(self) -> bool:
        """Whether causality hides anything from this many queries."""
        return self.causal and self.T > 1

    @property
    def square(self) -> bool:
        return self.T == self.S

    def length_of_rows(self) -> np.ndarray:
        """The number of keys of every batch row."""
        if not self.lengths:
            return np.full(self.B, self.S, np.int32)
        least = max(1 if self.square else self.T, self.S // 2)
        return np.random.default_rng(1).integers(least, self.S + 1, self.B).astype(np.int32)

    def q_positions(self) -> np.ndarray:
        """(B, T): where among the keys each query stands."""
        first = np.zeros(self.B, np.int32) if self.square else self.length_of_rows() - self.T
        return first[:, None] + np.arange(self.T, dtype=np.int32)

    def seen_keys(self) -> np.ndarray:
        """(B, T): how many keys each query sees; they are the first ones."""
        lengths = np.broadcast_to(self.length_of_rows()[:, None], (self.B, self.T))
        return np.minimum(lengths, self.q_positions() + 1) if self.hides else lengths

    def flops(self, backward: bool) -> float:
        """Of the matrix products over visible scores: two forward, and five backward (one of them done again)."""
        return 4.0 * self.N * self.H * float(self.seen_keys().sum()) * (3.5 if backward else 1)

    def least_bytes(self, backward: bool, dtype: str) -> float:
        """q, k, v, out, a bias and (backward) the gradients of the first four, each moved once, unseen keys never."""
        queries = self.B * self.T * self.N * self.H
        keys = int(self.seen_keys().max(1).sum()) * self.K * self.H
        bias = 4 * self.N * self.T * self.S if self.bias else 0
        return float((2 * queries + 2 * keys) * BYTES[dtype] * (2 if backward else 1) + bias)

    def score_bytes(self) -> int:
        """Of one whole float32 matrix of scores."""
        return 4 * self.B * self.N * self.T * self.S


def parse_case(text: str) -> Case:
    """`B,T,S,N,K,H[,causal][,bias][,lengths]` as a case; up to 8 queries over more keys decode, so forward only.

    Raises:
        InputError: not six positive integers and known words, heads that do not divide, or more queries than keys.
    """
    form = "expected B,T,S,N,K,H[,causal][,bias][,lengths], such as 1,512,512,8,2,64,causal"
    words = [word.strip() for word in text.split(",")]
    numbers, flags = words[:6], words[6:]
    if len(numbers) < 6 or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in numbers):
        raise InputError(f"--shapes: {text!r} does not begin with six positive integers; {form}")
    for flag in flags:
        if flag not in ("causal", "bias", "lengths"):
            raise InputError(f"--shapes: {text!r} has the unknown word {flag!r}; {form}")
    B, T, S, N, K, H = map(int, numbers)
    case = Case(B, T, S, N, K, H, "causal" in flags, "bias" in flags, "lengths" in flags, backward=T > 8 or T == S)
    if case.N % case.K:
        raise InputError(
            f"--shapes: {text!r} has {case.N} query heads, not a multiple of its {case.K} key heads; "
            "make N a multiple of K"
        )
    if case.T > case.S:
        raise InputError(f"--shapes: {text!r} has more queries ({case.T}) than keys ({case.S}); make T at most S")
    return case


PRESETS = ("llama", "bert", "t5", "long", "decode")


def preset(name: str, on_cpu: bool) -> list[Case]:
    """The cases of a preset; a CPU gets fewer rows and heads."""
    if name == "llama":
        N, K = (8, 2) if on_cpu else (32, 8)
        sizes = ((4, 512), (1, 2048)) if on_cpu else ((8, 512), (4, 2048), (2, 4096))
        return [Case(B, S, S, N, K, H, causal=True) for H in (128, 64) for B, S in sizes]
    if name == "bert":
        return [Case(8 if on_cpu else 64, S, S, 12, 12, 64, lengths=True) for S in (128, 256, 512)]
    if name == "t5":
        return [Case(2 if on_cpu else 16, 512, 512, 8, 8, 64, bias=True, scale=1.0)]
    if name == "long":
        return [Case(1, S, S, 8, 8, 64, causal=causal) for causal in (True, False) for S in (512, 2048, 8192)]
    N, K, B = (8, 2, 4) if on_cpu else (32, 8, 32)
    sizes = ((1, 2048), (1, 8192), (1, 16384), (4, 8192))
    return [Case(B, T, S, N, K, 128, causal=T > 1, lengths=True, backward=False) for T, S in sizes]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one case in numpy; q, k, v and dout float32 already rounded to the dtype that will be timed."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    bias: np.ndarray | None
    lengths: np.ndarray | None
    seen: np.ndarray | None  # (B, 1, T, S), only where causality cannot be said as "T equals S"


def make_inputs(case: Case, dtype: str) -> Inputs:
    """Normal inputs from a fixed seed, with scores of about unit variance whatever the scale."""
    rng = np.random.default_rng(0)
    scale = case.H**-0.5 if case.scale is None else case.scale

    def normal(*shape, factor=1.0):
        x = rng.standard_normal(shape, np.float32) * np.float32(factor)
        return x.astype(jnp.dtype(dtype)).astype(np.float32)

    q = normal(case.B, case.T, case.N, case.H, factor=1 / (scale * math.sqrt(case.H)))
    k, v = (normal(case.B, case.S, case.K, case.H) for _ in range(2))
    seen = None
    if case.hides and not case.square:
        seen = (np.arange(case.S) < case.seen_keys()[:, :, None])[:, None]
    return Inputs(
        q, k, v, normal(case.B, case.T, case.N, case.H),
        bias=rng.standard_normal((1, case.N, case.T, case.S), np.float32) if case.bias else None,
        lengths=case.length_of_rows() if case.lengths else None,
        seen=seen,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the oracle says of a part of one result: result[index], rows of H numbers in the last axis."""

    name: str  # out, dq, dk or dv
    index: tuple
    value: np.ndarray
    size: np.ndarray  # of each row: what its error is held against


def oracle(case: Case, inputs: Inputs) -> list[Piece]:
    """The pieces that are checked; gradients only for a case that has them."""
    pairs = [(b, k) for b in range(case.B) for k in range(case.K)]
    whole = max(1, ORACLE_SCORES // (case.N // case.K * case.T * case.S))
    some = np.unique(np.linspace(0, case.T - 1, min(SAMPLED_ROWS, case.T)).round().astype(int))
    return [
        piece
        for n, (b, k) in enumerate(reversed(pairs))
        for piece in _pair(case, inputs, b, k, np.arange(case.T) if n < whole else some)
    ]


def _pair(case: Case, inputs: Inputs, b: int, head: int, rows: np.ndarray) -> list[Piece]:
    """Attention of one batch row and key head, for some query rows, in float64."""
    group = case.N // case.K
    heads = np.arange(head * group, (head + 1) * group)
    scale = 1 / math.sqrt(case.H) if case.scale is None else case.scale
    k, v = inputs.k[b, :, head].astype(np.float64), inputs.v[b, :, head].astype(np.float64)
    seen_keys = case.seen_keys()[b]
    out, dq, subtracted = np.zeros((3, len(rows), group, case.H))
    dk, dv = np.zeros((2, case.S, case.H))
    block = max(1, 2**21 // case.S)
    for start in range(0, len(rows), block):
        now = rows[start : start + block]
        part = slice(start, start + len(now))
        last = int(seen_keys[now].max())
        unseen = np.arange(last) >= seen_keys[now][:, None]
        for g, n in enumerate(heads):
            q = inputs.q[b, now, n].astype(np.float64)
            p = q @ k[:last].T * scale
            if inputs.bias is not None:
                p += inputs.bias[0, n, now, :last]
            p[unseen] = -np.inf
            p -= p.max(-1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(-1, keepdims=True)
            out[part, g] = p @ v[:last]
            if case.backward:
                dout = inputs.dout[b, now, n].astype(np.float64)
                dv[:last] += p.T @ dout
                inner = (dout * out[part, g]).sum(-1, keepdims=True)
                lengths = np.linalg.norm(dout, axis=-1) * np.linalg.norm(out[part, g], axis=-1)
                subtracted[part, g] = scale * lengths[:, None] * (p @ k[:last])
                p *= dout @ v[:last].T - inner
                dq[part, g] = p @ k[:last] * scale
                dk[:last] += p.T @ q * scale
    chosen = (b, rows[:, None], heads[None, :])
    pieces = [Piece("out", chosen, out, _size(out))]
    if case.backward:
        pieces.append(Piece("dq", chosen, dq, np.maximum(_size(dq), _size(subtracted))))
        if len(rows) == case.T:
            pieces += [Piece(name, (b, slice(None), head), d, _size(d)) for name, d in (("dk", dk), ("dv", dv))]
    return pieces


def _size(rows: np.ndarray) -> np.ndarray:
    """The norm of each row, or a fiftieth of the largest: shorter rows are rounded like their neighbours."""
    norms = np.linalg.norm(rows, axis=-1)
    return np.maximum(norms, max(0.02 * norms.max(), 1e-30))


def check(results: dict[str, np.ndarray], expected: list[Piece]) -> dict[str, float]:
    """The largest error of each result, row by row: the norm of the difference over the size of the row.

    dq is a difference, sum_j p_j (dp_j - dout . out) k_j, and what every implementation that saves `out` in half
    precision loses is a share of what is subtracted: where that is larger than dq, it is the size. The first query of
    a causal call, whose dq is exactly zero, is the extreme. Late rows of long calls have sizes of their own, so a
    result that is nothing there fails.
    """
    errors: dict[str, float] = {}
    for piece in expected:
        if piece.name not in results:
            continue
        got = results[piece.name]
        apart = np.linalg.norm(got[piece.index].astype(np.float64) - piece.value, axis=-1)
        error = float((apart / piece.size).max())
        worst = errors.get(piece.name, 0.0)
        errors[piece.name] = error if math.isnan(error) else max(worst, error) if not math.isnan(worst) else worst
    return errors


def tolerance(dtype: str, on_cpu: bool) -> float:
    """The largest error that `check` may give."""
    return TOLERANCE_OF_FLOAT32_ON_ACCELERATOR if dtype == "float32" and not on_cpu else TOLERANCE[dtype]
