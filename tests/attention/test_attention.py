"""Both implementations against a float64 oracle and against the cases that break attention."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import attention as room
from llm.attention import BucketBias, Mask, attention_weights, blocks, relative_position_bucket
from llm.attention.dropout import key_words, philox_4x32
from llm.attention.target import compiling_for
from tests.attention import oracle

api, blockwise = (importlib.import_module(f"llm.attention.{name}") for name in ("api", "blockwise"))


def attention(q, k, v, **how):
    """`llm.attention.attention`, its arrays traced and the rest static: one compilation a call."""
    traced = {name: x for name, x in how.items() if name == "mask" or hasattr(x, "dtype") or isinstance(x, BucketBias)}
    static = {name: x for name, x in how.items() if name not in traced}
    return jax.jit(lambda q, k, v, traced: room.attention(q, k, v, **traced, **static))(q, k, v, traced)


@pytest.fixture(params=["reference", "blockwise", "blockwise of 8"])
def implementation(request, monkeypatch):
    """Each implementation; blockwise with one block, and with blocks so small that there are many."""
    if request.param == "blockwise of 8":
        monkeypatch.setattr(blockwise, "BLOCK", 8)
        return "blockwise"
    return request.param


def normal(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def compare(q, k, v, mask, implementation, *, tolerance=2e-5, **features):
    """Forward and all gradients against the oracle, jitted; returns the output."""
    bias, sinks = features.get("bias"), features.get("sinks_N")
    key = features.get("dropout_key")
    want = oracle.attention(
        q, k, v, mask, bias=bias, sinks=sinks, scale=features.get("scale"), softcap=features.get("softcap"),
        rate=features.get("dropout_rate", 0.0), words=None if key is None else np.asarray(key_words(key)),
    )  # fmt: skip
    trained = {n: x for n, x in (("bias", bias), ("sinks_N", sinks)) if x is not None}
    rest = {n: x for n, x in features.items() if n not in trained}

    @jax.jit
    def run(q, k, v, trained, dout, dlse):
        def f(q, k, v, trained):
            return room.attention(q, k, v, mask=mask, implementation=implementation, return_lse=True, **trained, **rest)

        (out, lse), pull = jax.vjp(f, q, k, v, trained)
        return out, lse, pull((dout, dlse))

    dout, dlse = normal(99, (*q.shape[:3], v.shape[3]), q.shape[:3])
    dlse = jnp.where(jnp.isfinite(jnp.asarray(want["lse"])), dlse, 0.0)
    out, lse, (dq, dk, dv, dtrained) = run(q, k, v, trained, dout.astype(q.dtype), dlse)
    gradients = want["gradients"](dout.astype(q.dtype), dlse)
    found = {"dq": dq, "dk": dk, "dv": dv, "dbias": dtrained.get("bias"), "dsinks": dtrained.get("sinks_N")}
    np.testing.assert_allclose(np.float64(out), want["out"], atol=tolerance, err_msg="out")
    np.testing.assert_allclose(lse, want["lse"], atol=tolerance, err_msg="lse")
    for name, value in gradients.items():
        np.testing.assert_allclose(np.float64(found[name]), value, atol=4 * tolerance, err_msg=name)
    return out


def test_t5_buckets():
    """The published buckets of 32, max distance 128."""
    x = jnp.array([-200, -128, -64, -32, -16, -8, -7, -1, 0, 1, 7, 8, 16, 32, 64, 128])
    both = relative_position_bucket(x, bidirectional=True)
    np.testing.assert_array_equal(both, [15, 15, 14, 12, 10, 8, 7, 1, 0, 17, 23, 24, 26, 28, 30, 31])
    causal = relative_position_bucket(x, bidirectional=False)
    np.testing.assert_array_equal(causal, [31, 31, 26, 21, 16, 8, 7, 1, 0] + [0] * 7)


# --- the cases that break attention -----------------------------------------------------------------------------------


SECOND_QUERY_SEES_NOTHING = {
    "dense": Mask(dense_BNTS=jnp.array([[[[True, True, False], [False] * 3]]])),
    "segments": Mask(q_segments_BT=jnp.array([[1, 0]]), kv_segments_BS=jnp.array([[1, 1, 0]])),
    "positions": Mask(causal=True, q_positions_BT=jnp.array([[1, -1]]), kv_positions_BS=jnp.array([[0, 1, 2]])),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", SECOND_QUERY_SEES_NOTHING)
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.long), True])
def test_query_without_a_key(implementation, kind, dtype, jit):
    mask = SECOND_QUERY_SEES_NOTHING[kind]
    q = jnp.zeros((1, 2, 1, 4), dtype)
    (k,) = normal(0, (1, 3, 1, 4), dtype=dtype)
    v = jnp.broadcast_to(jnp.arange(3, dtype=dtype)[None, :, None, None], (1, 3, 1, 4))
    dense = jnp.eye(4, dtype=dtype) * 2

    def loss(dense, q, k, v, rows):
        out = room.attention(q @ dense, k @ dense, v, mask=rows, implementation=implementation)
        return out[:, 0].sum().astype(jnp.float32), out

    run = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    (_, out), gradients = (jax.jit(run) if jit else run)(dense, q, k, v, mask)
    run = jax.jit(run)
    np.testing.assert_array_equal(np.float32(out[0, 0]), 0.5)
    np.testing.assert_array_equal(np.float32(out[0, 1]), 0.0)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    alone = jax.tree.map(lambda x: x[:, :1] if x.shape[1:2] == (2,) else x, mask)
    if mask.dense_BNTS is not None:
        alone = Mask(dense_BNTS=mask.dense_BNTS[:, :, :1])
    _, without = run(dense, q[:, :1], k, v, alone)
    for got, want in zip(gradients, (without[0], jnp.pad(without[1], ((0, 0), (0, 1), (0, 0), (0, 0))), *without[2:])):
        np.testing.assert_allclose(np.float32(got), np.float32(want), atol=1e-6)


def test_lengths_of_zero(implementation):
    q, k, v = normal(4, (2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    out = compare(q, k, v, Mask(kv_lengths_B=jnp.array([0, 4])), implementation)
    np.testing.assert_array_equal(out[0], 0)


def values(*numbers):
    return jnp.asarray(numbers, jnp.float32)[None, :, None, None]


def test_last_query_meets_last_key(implementation):
    def run(T, v):
        S = v.shape[1]
        return attention(
            jnp.zeros((1, T, 1, 1)), jnp.zeros((1, S, 1, 1)), v, mask=Mask(causal=True), implementation=implementation
        )[0, :, 0, 0]

    np.testing.assert_allclose(run(2, values(0, 1, 2, 3, 4)), [1.5, 2.0], atol=1e-6)
    np.testing.assert_allclose(run(5, values(1, 2)), [0, 0, 0, 1, 1.5], atol=1e-6)
    for S in (1, 2, 5, 9):
        np.testing.assert_allclose(run(1, values(*range(S))), [(S - 1) / 2], atol=1e-6)


@pytest.mark.parametrize("window", [None, (3, 0), (3, None)])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_longer_run(implementation, window, causal):
    T = 12
    q, k, v = normal(5, (2, T, 2, 4), (2, T, 2, 4), (2, T, 2, 4))
    mask = Mask(causal=causal, window=window)
    whole = attention(q, k, v, mask=mask, implementation=implementation)
    for n in (1, 2, 7, 12):
        part = attention(q[:, -n:], k, v, mask=mask, implementation=implementation)
        np.testing.assert_allclose(part, whole[:, -n:], atol=1e-5)


def test_windows_take_effect_and_hide_the_future(implementation):
    q, k, v = normal(6, (1, 9, 1, 4), (1, 9, 1, 4), (1, 9, 1, 4))
    for mask in (Mask(causal=True, window=(2, None)), Mask(window=(2, 0))):
        jacobian = jax.jacobian(
            lambda v, m=mask: attention(q, k, v, mask=m, implementation=implementation).sum((0, 2, 3))
        )(v)
        touched = np.abs(np.asarray(jacobian)).sum((1, 3, 4)) > 0
        rows, columns = np.indices((9, 9))
        np.testing.assert_array_equal(touched, (columns <= rows) & (columns >= rows - 2))


@pytest.mark.parametrize(
    "T, S, H, Hv",
    [(192, 192, 16, 16), (192, 320, 80, 80), (1, 77, 64, 64), (130, 130, 20, 20), (64, 64, 192, 128), (1, 1, 8, 8)],
)
@pytest.mark.parametrize("causal, dtype, tolerance", [(False, "float32", 2e-5), (True, "bfloat16", 2e-2)])
def test_sizes_that_fit_no_tile(monkeypatch, T, S, H, Hv, causal, dtype, tolerance):
    monkeypatch.setattr(blockwise, "BLOCK", 128)
    q, k, v = normal(7, (2, T, 3, H), (2, S, 3, H), (2, S, 3, Hv), dtype=jnp.dtype(dtype))
    out = compare(q, k, v, Mask(causal=causal), "blockwise", tolerance=tolerance, precision="highest")
    again = compare(q, k, v, Mask(causal=causal), "blockwise", tolerance=tolerance, precision="highest")
    np.testing.assert_array_equal(np.float32(out), np.float32(again))
    if dtype == "float32":
        compare(q, k, v, Mask(causal=causal), "reference", tolerance=tolerance)


def test_packed_documents(implementation):
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    mask = Mask(causal=True, q_segments_BT=segments, kv_segments_BS=segments)
    zeros = jnp.zeros((1, 8, 1, 1))
    out = attention(zeros, zeros, values(*range(1, 9)), mask=mask, implementation=implementation)
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 1.5, 2, 4, 4.5, 5, 0, 0], atol=1e-6)


@pytest.mark.parametrize("N, K", [(4, 2), (4, 1), (4, 4)])
def test_heads_share_keys_in_groups(implementation, N, K):
    q, k, v, bias = normal(8, (2, 5, N, 4), (2, 7, K, 4), (2, 7, K, 4), (2, N, 5, 7))
    dense = jnp.asarray(np.random.default_rng(0).random((2, N, 5, 7)) > 0.4)

    def loss(k, v, repeat):
        k, v = (jnp.repeat(x, N // K, axis=2) if repeat else x for x in (k, v))
        out = attention(q, k, v, bias=bias, mask=Mask(dense_BNTS=dense), implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (_, grouped), g = run(k, v, False)
    (_, repeated), r = run(k, v, True)
    np.testing.assert_allclose(grouped, repeated, atol=1e-5)
    for got, want in zip(g, r):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_values_and_refusal(implementation):
    zeros = jnp.zeros((1, 3, 4, 2))
    v = jnp.broadcast_to(jnp.array([10.0, 20.0])[None, None, :, None], (1, 3, 2, 2))
    out = attention(zeros, zeros[:, :, :2], v, implementation=implementation)
    np.testing.assert_allclose(out[0, 0, :, 0], [10, 10, 20, 20], atol=1e-5)
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 key heads"):
        attention(jnp.zeros((1, 3, 6, 2)), zeros, zeros, implementation=implementation)


def test_half_precision(implementation):
    def run(q, k, v, **how):
        out = attention(q, k, v, implementation=implementation, **how)
        assert out.dtype == q.dtype and bool(jnp.isfinite(out).all())
        return np.float32(out)

    half = jnp.float16
    one = Mask(dense_BNTS=jnp.zeros((1, 1, 1, 5), bool).at[..., 3].set(True))
    q, k, v = normal(9, (1, 1, 1, 8), (1, 5, 1, 8), (1, 5, 1, 8), dtype=half)
    np.testing.assert_allclose(run(q, k, v, mask=one)[0, 0], np.float32(v)[0, 3], atol=1e-3)  # (a)

    segments = jnp.array([[1, 1, 0, 0]])
    q, k, v = normal(9, (1, 4, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8), dtype=jnp.bfloat16)
    run(q, k, v, mask=Mask(causal=True, q_segments_BT=segments, kv_segments_BS=segments))  # (b)

    k = jnp.asarray([1.0, 2.0, 3e4], half)[None, :, None, None]
    hidden = Mask(dense_BNTS=jnp.array([[[[True, True, False]]]]))
    weighted = run(jnp.ones((1, 1, 1, 1), half), k, values(0, 0, 1).astype(half), mask=hidden, scale=1.0)
    assert weighted == 0.0  # (c)

    hundred = jnp.full((1, 2, 1, 64), 100, half)
    np.testing.assert_allclose(run(hundred, hundred, jnp.ones((1, 2, 1, 64), half)), 1.0, atol=1e-3)  # (d)

    zeros = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    k = jnp.zeros((1, 1000, 1, 4), jnp.bfloat16)
    np.testing.assert_allclose(run(zeros, k, jnp.ones_like(k)), 1.0, atol=0.01)  # (e)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # the known answers that Random123 ships
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_golden_vectors(counter, key, expected):
    words = philox_4x32(tuple(jnp.uint32(c) for c in counter), tuple(jnp.uint32(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def test_dropout_bits(implementation):
    """One mask a head and row, the same again by key, no other by block size; kept weights doubled."""
    B, T, N = 2, 64, 3
    q = jnp.zeros((B, T, N, T))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (B, T, N, T))  # the output is the weight matrix itself

    def weights(key, **how):
        return np.asarray(attention(q, q, v, dropout_rate=0.5, dropout_key=key, **how))

    first = weights(jax.random.key(1), implementation=implementation)
    np.testing.assert_array_equal(first > 0, weights(jax.random.key(1), implementation="reference") > 0)
    assert set(np.unique(np.round(first * T, 4))) == {0.0, 2.0}
    assert abs((first > 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(first.size)
    other = weights(jax.random.key(2), implementation=implementation)
    kept = [(x > 0)[b, :, n] for x in (first, other) for b in range(B) for n in range(N)]
    for i in range(len(kept)):
        for j in range(i):
            assert 0.4 < (kept[i] == kept[j]).mean() < 0.6
    with pytest.raises(ValueError, match="needs a dropout_key"):
        attention(q, q, v, dropout_rate=0.5, implementation=implementation)


# --- memory, skipped blocks, random masks, refusals -------------------------------------------------------------------


def test_memory_is_linear_in_length():
    def temporary(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        f = jax.grad(lambda q, k, v: attention(q, k, v, mask=Mask(causal=True), implementation="blockwise").sum())
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporary(T) for T in (2048, 4096, 8192)]
    assert sizes[1] < 2.2 * sizes[0] and sizes[2] < 2.2 * sizes[1], sizes


def test_memory_above_the_inputs_at_8192_is_below_100_megabytes():
    """Temporary memory of forward and backward, float32, 8 heads of 64."""
    x = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)

    def both(q, k, v, dout):
        return jax.vjp(lambda *a: room.attention(*a, mask=Mask(causal=True), implementation="blockwise"), q, k, v)[1](
            dout
        )

    assert jax.jit(both).lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes < 100e6


def computed_pairs(mask):
    """The number of pairs of blocks that the loop of a call with 32 queries and keys in blocks of 8 runs over."""
    plan = blocks.Plan(2, 32, 32, 1, 1, 2, 1, 8, 8)
    return int(blocks.listed(blocks.needed(plan, blocks.geometry(plan, mask)).any(-1))[1])


@pytest.mark.parametrize(
    "mask, pairs",
    [
        (Mask(), 16),
        (Mask(causal=True), 10),
        (Mask(causal=True, window=(7, None)), 7),
        (Mask(window=(0, 0)), 4),
        (Mask(kv_lengths_B=jnp.array([8, 3])), 4),
    ],
)
def test_hidden_blocks_are_not_computed(mask, pairs):
    assert computed_pairs(mask) == pairs


def test_blocks_of_other_documents_are_not_computed():
    segments = jnp.array([[1] * 16 + [2] * 8 + [0] * 8])
    assert computed_pairs(Mask(causal=True, q_segments_BT=segments, kv_segments_BS=segments)) == 3 + 1


@pytest.mark.long
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_sequence_shards_merged_by_their_lse_are_the_whole(implementation, dropout_rate):
    """Shards of queries against shards of keys, as on a ring: output, log-sum-exp and gradients (jitted, float32)."""
    B, T, N, K, H = 2, 24, 4, 2, 8
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (8, N), (N,), (B, T, N, H), (B, T, N)
    q, k, v, table, sinks, dout, dlse = normal(11, *shapes)
    documents = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), axis=1))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    how = dict(
        softcap=3.0, implementation=implementation, return_lse=True, dropout_rate=dropout_rate,
        dropout_key=jax.random.key(2),
    )  # fmt: skip

    def shard(q, k, v, table, sinks, rows, columns):
        mask = Mask(
            causal=True, window=(9, None), q_segments_BT=documents[:, rows], kv_segments_BS=documents[:, columns],
            q_positions_BT=positions[:, rows], kv_positions_BS=positions[:, columns],
        )  # fmt: skip
        return room.attention(
            q[:, rows], k[:, columns], v[:, columns], mask=mask, bias=BucketBias(table), sinks_N=sinks, **how
        )

    def ring(q, k, v, table, sinks):
        outs, lses = [], []
        for rows in (slice(0, 12), slice(12, 24)):
            starts = {0: sinks, 8: None, 16: None}  # the sinks take part once
            parts = [shard(q, k, v, table, at, rows, slice(i, i + 8)) for i, at in starts.items()]
            out, lse = room.merge(parts)
            outs.append(out)
            lses.append(lse)
        return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *arrays):
        (out, lse), pull = jax.vjp(function, *arrays)
        return out, jnp.where(jnp.isfinite(lse), lse, -1e9), pull((dout, jnp.where(jnp.isfinite(lse), dlse, 0.0)))

    whole = run(lambda *arrays: shard(*arrays, slice(0, T), slice(0, T)), q, k, v, table, sinks)
    for got, want in zip(jax.tree.leaves(run(ring, q, k, v, table, sinks)), jax.tree.leaves(whole)):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_weights_sum_to_one_and_hide_what_is_masked():
    q, k = normal(12, (2, 5, 4, 8), (2, 5, 2, 8))
    weights = attention_weights(q, k, mask=Mask(causal=True))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert float(jnp.abs(jnp.triu(weights, 1)).max()) == 0.0


Q = jnp.zeros((2, 3, 4, 8))
REFUSED = {
    "widths": (dict(k_BSKH=jnp.zeros((2, 3, 4, 6))), r"head width, 8 and 6"),
    "lengths": (dict(v_BSKH=jnp.zeros((2, 5, 4, 8))), r"k and v differ"),
    "batch": (dict(q_BTNH=jnp.zeros((1, 3, 4, 8))), r"q and k differ in batch"),
    "axes": (dict(q_BTNH=jnp.zeros((2, 3, 8))), r"four axes"),
    "integers": (dict(q_BTNH=jnp.zeros((2, 3, 4, 8), jnp.int32)), r"dtype int32"),
    "implementation": (
        dict(implementation="flash"),
        r"unknown implementation 'flash'; there are auto, reference, blockwise, cudnn"
        + ("" if jax.default_backend() == "gpu" else r" \(needs an NVIDIA GPU"),
    ),
    "keys": (
        dict(dropout_rate=0.1, dropout_key=jax.random.split(jax.random.key(0), 3)),
        r"dropout_key has shape \(3,\)",
    ),
    "far window": (dict(mask=Mask(window=(2**31, None))), r"window=\(2147483648, None\)"),
    "rate": (dict(dropout_rate=1.0, dropout_key=jax.random.key(0)), r"dropout_rate=1.0"),
    "bias": (dict(bias=jnp.zeros((2, 4, 3, 2))), r"bias has shape \(2, 4, 3, 2\)"),
    "sinks": (dict(sinks_N=jnp.zeros(3)), r"sinks_N has shape \(3,\)"),
    "mask shape": (dict(mask=Mask(kv_lengths_B=jnp.zeros(3, jnp.int32))), r"kv_lengths_B has shape \(3,\)"),
    "mask dtype": (dict(mask=Mask(dense_BNTS=jnp.zeros((2, 1, 3, 3)))), r"dense_BNTS has dtype float32"),
    "one segment": (dict(mask=Mask(q_segments_BT=jnp.ones((2, 3), jnp.int32))), r"given together"),
    "window": (dict(mask=Mask(window=(-1, None))), r"window=\(-1, None\)"),
}  # fmt: skip


def test_unsigned_positions_count_like_signed_ones(implementation):
    q, k, v = normal(13, (1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    at = [(jnp.array([[1, 2]]).astype(d), jnp.array([[0, 1, 2]]).astype(d)) for d in ("int32", "uint32", "uint8")]
    outs = [
        attention(
            q, k, v, implementation=implementation,
            mask=Mask(window=(2, None), q_positions_BT=mine, kv_positions_BS=theirs),
        )
        for mine, theirs in at
    ]  # fmt: skip
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_is_wrong(name):
    changed, message = REFUSED[name]
    arguments = {"q_BTNH": Q, "k_BSKH": Q, "v_BSKH": Q, **changed}
    with pytest.raises(ValueError, match=message):
        attention(arguments.pop("q_BTNH"), arguments.pop("k_BSKH"), arguments.pop("v_BSKH"), **arguments)


HALF = jnp.zeros((2, 4, 4, 8), jnp.bfloat16)
CUDNN_LACKS = {
    "float32": ({n: HALF.astype("float32") for n in ("q_BTNH", "k_BSKH", "v_BSKH")}, "takes float16 and bfloat16"),
    "width": ({n: HALF[..., :5] for n in ("q_BTNH", "k_BSKH", "v_BSKH")}, "head width"),
    "soft cap": (dict(softcap=2.0), "soft cap"),
    "sinks": (dict(sinks_N=jnp.zeros(4)), "sinks"),
    "dropout": (dict(dropout_rate=0.1, dropout_key=jax.random.key(0)), "dropout"),
    "buckets": (dict(bias=BucketBias(jnp.zeros((8, 4)))), "bucket bias"),
    "bias": (dict(bias=jnp.zeros((2, 4, 4, 4), jnp.bfloat16)), "bias of shape"),
    "packing": (dict(mask=Mask(q_segments_BT=jnp.ones((2, 4), int), kv_segments_BS=jnp.ones((2, 4), int))), "packing"),
    "positions": (dict(mask=Mask(q_positions_BT=jnp.ones((2, 4), int))), "positions"),
    "prefix": (dict(mask=Mask(causal=True, prefix_lengths_B=jnp.ones(2, int))), "prefix"),
    "dense": (dict(mask=Mask(dense_BNTS=jnp.ones((1, 1, 4, 4), bool))), "dense mask"),
    "window": (dict(mask=Mask(window=(2, 2))), "window"),
    "causal": (dict(q_BTNH=HALF[:, :3], mask=Mask(causal=True)), "first query"),
    "platform": ({}, "needs an NVIDIA GPU"),
    "lse": (dict(return_lse=True), "log-sum-exp"),
}


@pytest.mark.parametrize("name", CUDNN_LACKS)
def test_cudnn_names_what_it_lacks(name):
    if name == "platform" and jax.default_backend() == "gpu":
        pytest.skip("this is the platform")
    changed, message = CUDNN_LACKS[name]
    arguments = {"q_BTNH": HALF, "k_BSKH": HALF, "v_BSKH": HALF, **changed}
    with pytest.raises(NotImplementedError, match=f"^attention: cudnn .*{message}"):
        room.attention(**arguments, implementation="cudnn")


# --- what auto is -----------------------------------------------------------------------------------------------------


TPU, HOPPER, AMPERE = (
    dict(platform="tpu", kind="TPU v5 lite"),
    dict(platform="gpu", kind="NVIDIA H100 80GB HBM3", capability="9.0"),
    dict(platform="gpu", kind="NVIDIA A100-SXM4-80GB", capability="8.0"),
)


@pytest.mark.parametrize(
    "device, dtype, how, name, reason",
    [
        (TPU, "bfloat16", {}, "mosaic_tpu", ""),
        (TPU, "float16", {}, "blockwise", "mosaic_tpu takes float32 or bfloat16 for all of q, k and v, got float16"),
        (HOPPER, "bfloat16", {}, "mosaic_gpu", ""),
        (HOPPER, "float32", {}, "blockwise", "mosaic_gpu takes float16 and bfloat16, q is float32"),
        (AMPERE, "bfloat16", {}, "cudnn", "mosaic_gpu needs compute capability 9.x, here it is 8.0"),
        (AMPERE, "bfloat16", dict(softcap=2.0), "blockwise", "cudnn has no soft cap"),
        (AMPERE, "bfloat16", dict(return_lse=True), "blockwise", "cudnn gives no log-sum-exp"),
        (dict(platform="cpu", kind="cpu"), "float32", {}, "blockwise", ""),
    ],
)
def test_auto_goes_by_the_device_and_says_why(device, dtype, how, name, reason, caplog, monkeypatch):
    api._log.cache_clear()
    called = []

    def spy(which):
        def implementation(q, k, v, **_):
            called.append(which)
            return q, jnp.zeros(q.shape[:3])

        return implementation

    for which in api.IMPLEMENTATIONS:
        monkeypatch.setitem(api.IMPLEMENTATIONS, which, spy(which))
    x = jnp.zeros((1, 8, 2, 64), dtype)
    with compiling_for(**device), caplog.at_level("INFO"):
        attention(x, x, x, **how)
        attention(x, x, x, **how)
    assert called == [name, name]
    lines = [r.getMessage() for r in caplog.records if "auto is" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(f"attention: auto is {name} on {device['platform']}"), lines
    assert reason in lines[0]


def test_a_kernel_refuses_another_platform():
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs a TPU, the platform here is cpu"):
        attention(x, x, x, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="mosaic_gpu needs an NVIDIA GPU of compute capability 9.x"):
        attention(x, x, x, implementation="mosaic_gpu")


def test_tpu_lists_that_scalar_memory_cannot_hold_are_refused():
    """Four packed rows of 131,072 tokens; a window alone makes a short list at any length."""
    long = jax.ShapeDtypeStruct((4, 2**17, 1, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((4, 2**17), jnp.int32)

    def chosen(mask, k_dtype=jnp.bfloat16):
        k = jax.ShapeDtypeStruct(long.shape, k_dtype)
        with compiling_for(**TPU):
            return api.PARTIAL["mosaic_tpu"].lacks(long, k, k, mask=mask)

    packed = Mask(causal=True, q_segments_BT=segments, kv_segments_BS=segments)
    assert chosen(packed) == (
        "has room for a list of 131,072 pairs of blocks, these masks and lengths may need 262,144"
    )
    assert chosen(Mask(causal=True, window=(1000, 0))) is None
    assert "for all of q, k and v, got bfloat16, float32 and float32" in chosen(Mask(), jnp.float32)
