"""The Hopper kernels without a device: mathematics of tiles in float64, whole kernels in the interpreter."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.attention import BucketBias, Mask, attention, blocks, dropout, pallas_versions
from llm.attention import mosaic_gpu_decode as decode
from llm.attention import mosaic_gpu_tiles as tiles
from llm.attention.reference import reference
from llm.attention.target import compiling_for

ours = importlib.import_module("llm.attention.mosaic_gpu")
WORDS = jnp.asarray([123456789, 987654321, 3, 5], jnp.uint32)


def settings(**changes) -> tiles.Settings:
    sizes = ours.sizes(64, "bfloat16")
    s = tiles.Settings(2, 200, 300, 4, 2, 64, 0.125, None, 0.0, Mask(), *sizes, ctas=132)
    return dataclasses.replace(s, **changes)


# --- tile mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [0.3, -0.2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_running_softmax_is_the_softmax_in_float64(softcap, scale, with_bias):
    rng = np.random.default_rng(0)
    products, bias = rng.normal(size=(4, 64, 32)) * 9, rng.normal(size=(4, 64, 32)) * with_bias
    seen = rng.random((4, 64, 32)) > 0.4
    seen[0, :7] = False  # rows that see nothing at first
    seen[:, 3] = False  # and one that sees nothing at all
    logits = products * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen, logits + bias, -np.inf)
    top, total, weights = np.full(64, -np.inf, np.float32), np.zeros(64, np.float32), np.zeros((0, 64, 32))
    for n in range(4):
        add = (lambda x, n=n: x + np.float32(bias[n])) if with_bias else None
        x, factor, _ = tiles.finish(np.float32(products[n]), scale, softcap, add)
        x = jnp.where(seen[n], x, -jnp.inf)
        p, shrink, top, total = tiles.weigh(x, factor, top, total, lambda y: y[:, None])
        weights = np.concatenate([weights * np.float64(shrink)[:, None], np.float64(p)[None]])
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum((0, 2)))
    np.testing.assert_allclose(np.float64(ours.log_sum(top, total)), lse, rtol=2e-6, atol=2e-6)
    rows = np.arange(64) != 3
    got = weights[:, rows] / np.float64(total)[rows, None]
    np.testing.assert_allclose(got, np.exp(logits[:, rows] - lse[rows, None]), rtol=3e-5, atol=1e-7)
    assert np.all(weights[:, 3] == 0) and float(total[3]) == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_of_scores_is_that_of_float64(softcap):
    rng = np.random.default_rng(1)
    raw, dp = rng.normal(size=(64, 32)) * 3, rng.normal(size=(64, 32))

    def capped_of(raw):
        return raw if softcap is None else softcap * np.tanh(raw / softcap)

    def weights(raw):
        e = np.exp(capped_of(raw))
        return e / e.sum(-1, keepdims=True)

    step, want = 1e-6, np.zeros_like(raw)
    for column in range(raw.shape[1]):
        moved = np.zeros_like(raw)
        moved[:, column] = step
        want[:, column] = ((weights(raw + moved) - weights(raw - moved)) * dp).sum(-1) / (2 * step)
    p = weights(raw)
    delta = (p * dp).sum(-1, keepdims=True)
    biased, got = tiles.score_gradient(p, dp, delta, 0.0, capped_of(raw), softcap)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(biased, p * (dp - delta), atol=1e-6)


def test_dropout_mark_is_the_decision_of_dropout_and_spares_the_weight():
    rng = np.random.default_rng(2)
    p = jnp.asarray(rng.random((64, 32)), jnp.float32)
    q, k = np.broadcast_to(np.arange(64)[:, None] + 1000, p.shape), np.broadcast_to(np.arange(32) + 77, p.shape)
    marked = tiles.mark(
        pallas_versions.Machine(True), p, WORDS, 0.3, jnp.int32(2), jnp.int32(1), jnp.asarray(q), jnp.asarray(k)
    )
    want = dropout.keep(WORDS, 0.3, jnp.int32(2), jnp.int32(1), jnp.asarray(q), jnp.asarray(k))
    np.testing.assert_array_equal(tiles.survives(marked), want)
    assert 0.6 < float(want.mean()) < 0.8
    np.testing.assert_allclose(marked, p, rtol=1.3e-7)


class Register:
    """A value of a stand-in for MLIR's arithmetic, in numpy."""

    def __init__(self, x):
        self.x, self.type = x, x.dtype


def stand_in(monkeypatch):
    """Puts numpy in the place of the MLIR builders of `mosaic_gpu_tiles`."""

    def on(function):
        return lambda *values: Register(np.asarray(function(*(v.x for v in values))))

    def wide(a, b):
        product = a.x.astype(np.uint32).astype(np.uint64) * b.x.astype(np.uint32).astype(np.uint64)
        return Register(product.astype(np.uint32)), Register((product >> np.uint64(32)).astype(np.uint32))

    predicates = types.SimpleNamespace(eq=np.equal, uge=np.greater_equal)
    arith = types.SimpleNamespace(
        constant=lambda kind, value: Register(np.asarray(value % 2**32, np.uint32)),
        CmpIPredicate=predicates, cmpi=lambda how, a, b: on(how)(a, b), mului_extended=wide,
        addi=on(np.add), xori=on(np.bitwise_xor), andi=on(np.bitwise_and), ori=on(np.bitwise_or), select=on(np.where),
        shrsi=on(lambda a, n: (a.view(np.int32) >> np.int32(n)).view(np.uint32)),
        bitcast=lambda kind, v: Register(v.x.view(kind)),
    )  # fmt: skip
    ir = types.SimpleNamespace(
        IntegerType=types.SimpleNamespace(get_signless=lambda bits: None),
        IntegerAttr=types.SimpleNamespace(get=lambda kind, value: value), VectorType=type(None),
    )  # fmt: skip
    monkeypatch.setattr(tiles, "arith", arith)
    monkeypatch.setattr(tiles, "ir", ir)


def test_dropout_mark_of_registers_is_the_decision_of_dropout(monkeypatch):
    stand_in(monkeypatch)
    rng = np.random.default_rng(2)
    p = rng.random((64, 32)).astype(np.float32)
    q = np.broadcast_to(np.arange(64, dtype=np.uint32)[:, None] + 1000, p.shape)
    k = np.broadcast_to(np.arange(32, dtype=np.uint32) - np.uint32(13), p.shape)  # some before 0
    words = np.asarray(WORDS)
    scalars = [np.full(p.shape, x, np.uint32) for x in (words[0], words[1], 2 + words[2], 1 + words[3])]
    values = [Register(np.ascontiguousarray(x)) for x in (p, q, k, *scalars)]
    marked = tiles._mark_registers(round(0.3 * 2**32), *values)
    positions = (jnp.asarray(x.astype(np.int32)) for x in (q, k))
    want = dropout.keep(WORDS, 0.3, jnp.int32(2), jnp.int32(1), *positions)
    np.testing.assert_array_equal(marked.x.view(np.int32) & 1, want)
    np.testing.assert_allclose(marked.x, p, rtol=1.3e-7)


def test_dropped_weights_get_no_gradient_of_their_own():
    p, dp = np.float32([[0.25, 0.75]]), np.float32([[2.0, 4.0]])
    bits = (p.view(np.int32) & ~1) | np.int32([[1, 0]])
    _, ds = tiles.score_gradient(jnp.asarray(bits.view(np.float32)), dp, np.float32([[1.0]]), 0.5)
    np.testing.assert_allclose(ds, [[0.25 * (2 * 2 - 1), -0.75]], rtol=1e-6)


# --- lists ------------------------------------------------------------------------------------------------------------

MASKS = {
    "full": lambda rng: Mask(),
    "causal": lambda rng: Mask(causal=True),
    "window": lambda rng: Mask(causal=True, window=(70, None)),
    "lengths": lambda rng: Mask(kv_lengths_B=jnp.asarray([300, 5])),
    "prefix": lambda rng: Mask(causal=True, prefix_lengths_B=jnp.asarray([190, 0])),
    "packing": lambda rng: Mask(
        q_segments_BT=jnp.asarray(np.sort(rng.integers(0, 4, (2, 200)))),
        kv_segments_BS=jnp.asarray(np.sort(rng.integers(0, 4, (2, 300)))),
    ),
    "dense": lambda rng: Mask(dense_BNTS=jnp.asarray(rng.random((2, 1, 200, 300)) > 0.5)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_all_that_is_seen_and_mask_what_must_be(name, turned):
    s, mask = settings(), MASKS[name](np.random.default_rng(3))
    order, counts = (np.asarray(x) for x in tiles.lists(s, mask, 64, 32, turned))
    q, k = mask.positions(s.queries, s.keys)
    seen = np.asarray(blocks.visible(mask, q, k, mask.q_segments_BT, mask.kv_segments_BS))
    if mask.dense_BNTS is not None:
        seen = seen & np.asarray(mask.dense_BNTS[:, 0])
    seen = np.broadcast_to(seen, (2, 200, 300))
    # Queries beyond the end are like the last one; keys beyond it are hidden.
    seen = np.pad(np.pad(seen, ((0, 0), (0, 56), (0, 0)), mode="edge"), ((0, 0), (0, 0), (0, 20)))
    seen = seen.reshape(2, 4, 64, 10, 32).transpose(0, 1, 3, 2, 4)
    some, every = seen.any((-1, -2)), seen.all((-1, -2))
    if turned:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    order, counts = (np.broadcast_to(x, (2, *x.shape[1:])) for x in (order, counts))
    for at in np.ndindex(some.shape[:2]):
        whole, end = counts[at]
        assert sorted(order[at]) == list(range(some.shape[2]))
        assert set(np.flatnonzero(some[at])) <= set(order[at][:end])
        assert set(order[at][:whole]) <= set(np.flatnonzero(every[at]))
        if name in ("full", "causal", "window", "lengths"):
            assert whole == every[at].sum() and end == some[at].sum()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_spans_hold_every_bucket_of_a_tile(bidirectional):
    s, bias = settings(), BucketBias(jnp.arange(32.0)[:, None].repeat(4, 1), bidirectional=bidirectional)
    mask = Mask()
    given = tiles.table(s, bias, mask, 128, 32, turned=False)
    q, k = (np.asarray(x)[0] for x in mask.positions(s.queries, s.keys))
    want = np.asarray(bias.at(jnp.asarray(q)[None], jnp.asarray(k)[None]))[0, 0]
    edges, table, met = (np.asarray(given[name]) for name in ("edges", "table", "spans"))
    assert met.shape == (1, 4, 10, 2)
    for row, column in np.ndindex(4, 10):
        rows, columns = q[row * 64 : row * 64 + 64], k[column * 32 : column * 32 + 32]
        if not rows.size:
            continue
        relative = columns[None, :] - rows[:, None]
        got = np.full(relative.shape, np.nan)
        for r in range(*met[0, row, column]):
            got[(relative >= edges[r, 0]) & (relative <= edges[r, 1])] = table[1, r]
        np.testing.assert_array_equal(got, want[row * 64 : row * 64 + 64, column * 32 : column * 32 + 32])


# --- whole kernels in the interpreter ---------------------------------------------------------------------------------


def interpreted(detect_races: bool = False):
    """A Hopper GPU of two multiprocessors in the interpreter."""
    how = pallas_versions.interpreter(detect_races)
    return compiling_for("gpu", "interpreter", capability="9.0", cores=2, interpret=how)


def call(function, arrays, mask, cotangents, rate=0.0, softcap=None):
    """(out, lse, gradients) of an implementation."""

    @jax.jit
    def run(arrays, cotangents):
        def f(arrays):
            given = {"bias": None, "sinks_N": None} | {n: x for n, x in arrays.items() if n not in "qkv"}
            return function(
                arrays["q"], arrays["k"], arrays["v"], mask=mask, scale=None, softcap=softcap, dropout_rate=rate,
                dropout_words=WORDS if rate else None, precision=None, **given,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(f, arrays)
        dout, dlse = cotangents
        return out, lse, pull((dout.astype(out.dtype), jnp.where(jnp.isfinite(lse), dlse, 0.0)))[0]

    return jax.device_get(run(arrays, cotangents))


def both(arrays_of, mask, rate=0.0, softcap=None, T=140, S=150, H=64, N=4, K=2, dtype="bfloat16"):
    """Compares the kernels with `reference` in float32 on the same half-precision numbers."""
    rng = np.random.default_rng(4)
    shapes = {"q": (1, T, N, H), "k": (1, S, K, H), "v": (1, S, K, H)}
    arrays = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | arrays_of(rng)
    cotangents = jnp.asarray(rng.normal(size=shapes["q"]), dtype), jnp.asarray(rng.normal(size=(1, T, N)), jnp.float32)
    got = call(ours.mosaic_gpu, arrays, mask, cotangents, rate, softcap)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    want = call(reference, *exact[:1], mask, exact[1], rate, softcap)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    unit = float(jnp.finfo(dtype).eps)
    for have, should in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        have, should = np.float64(have), np.float64(should)
        finite = np.isfinite(should)
        np.testing.assert_array_equal(have[~finite], should[~finite])
        size = np.abs(should[finite]).max()
        np.testing.assert_allclose(have[finite], should[finite], atol=2 * unit * size, rtol=0)


def none(rng):
    return {}


CALLS = {
    "causal": dict(arrays_of=none, mask=Mask(causal=True)),
    "wide heads": dict(arrays_of=none, mask=Mask(causal=True, window=(50, None)), H=256, T=70, S=80, N=2, K=1),
    "buckets, sinks, soft cap, dropout": dict(
        arrays_of=lambda rng: {
            "bias": BucketBias(jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), max_distance=40),
            "sinks_N": jnp.asarray([-jnp.inf, 0.0, 1.0, 2.0]),
        },
        mask=Mask(causal=True, kv_lengths_B=jnp.asarray([131])),
        rate=0.25, softcap=3.0,
    ),
    "bias of keys, packing": dict(
        arrays_of=lambda rng: {"bias": jnp.asarray(rng.normal(size=(1, 4, 1, 150)), jnp.float32)},
        mask=Mask(q_segments_BT=jnp.arange(140)[None] // 50, kv_segments_BS=jnp.arange(150)[None] // 50),
    ),
    "decode": dict(
        arrays_of=none, T=2, S=2500, mask=Mask(causal=True, kv_lengths_B=jnp.asarray([2000]),
        q_positions_BT=jnp.asarray([[1998, 1999]])),
    ),
}  # fmt: skip


# A minute and more in the interpreter; the conformance table has their features in smaller cases.
SLOW = ("wide heads", "buckets, sinks, soft cap, dropout", "bias of keys, packing")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else pytest.mark.long) for n in CALLS]
)
def test_kernels_in_the_interpreter(name):
    with interpreted():
        both(**CALLS[name])


@pytest.mark.long
@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="the detector of jax 0.11 reports a copy into memory that was read before a barrier, in any ring",
)
def test_kernels_have_no_races():
    interpret = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    with interpreted(detect_races=True):
        both(none, Mask(causal=True), dtype="float16", T=260, S=300, N=2, K=1)
    assert not interpret.get_races().races_found


def test_decode_path_is_taken_and_splits():
    s = settings(queries=2, keys=4096)
    assert decode.fits(s) and not decode.fits(dataclasses.replace(s, rate=0.1))
    folded, *_ = decode.fold(s, jnp.zeros((2, 2, 4, 64), jnp.bfloat16), None, Mask(causal=True))
    assert folded.splits == 8 and folded.heads == 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, dtype, message",
    [(64, "float32", "takes float16 and bfloat16"), (512, "bfloat16", "head widths of at most 256")],
)
def test_what_is_lacking_is_named(width, dtype, message):
    x = jnp.zeros((1, 8, 2, width), dtype)
    with interpreted(), pytest.raises(NotImplementedError, match=f"attention: mosaic_gpu .*{message}"):
        attention(x, x, x, implementation="mosaic_gpu")
