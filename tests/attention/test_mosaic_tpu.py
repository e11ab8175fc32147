"""The TPU kernels: what they compile to on four generations, races and bounds, and the list of pairs they visit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from llm.attention import BucketBias, Mask, attention
from llm.attention import mosaic_tpu_tile as tile
from llm.attention.block_sizes import Blocks, using
from llm.attention.blocks import Plan
from llm.attention.target import compiling_for
from llm.sharding.attention import attention as sharded_attention
from tests.attention import oracle
from tests.conformance.attention import CASES, inputs
from tests.helpers import long_but

# The compilation cache that tests share cannot read programs for devices that are not here, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

TOPOLOGIES = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}


@pytest.fixture(scope="module")
def devices():
    """A description of one device of every generation, from libtpu, which tests/requirements.txt installs."""
    with pytest.MonkeyPatch.context() as patch:
        # Two test processes at once would otherwise trip over libtpu's lock file.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        yield {name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0] for name in TOPOLOGIES}


def compiled(device, *, B=2, T=1024, S=1024, N=4, K=2, H=128, dtype=jnp.bfloat16, backward=True, fields=(), **call):
    """Attention, and its gradient, compiled for a device that is not here; `fields` of the mask are arrays."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = {
        "q_segments_BT": (B, T), "kv_segments_BS": (B, S), "q_positions_BT": (B, T), "kv_positions_BS": (B, S),
        "kv_lengths_B": (B,), "prefix_lengths_B": (B,), "dense_BNTS": (B, 1, T, S),
    }  # fmt: skip
    masks = {name: array(*shapes[name], dtype=bool if "dense" in name else jnp.int32) for name in fields}
    bias, sinks = call.pop("bias", None), array(N, dtype=jnp.float32) if call.pop("sinks", False) else None
    window, dropping = call.pop("window", None), "dropout_rate" in call
    if bias == "table":
        bias = BucketBias(array(32, N, dtype=jnp.float32), bidirectional=True)
    elif bias is not None:
        bias = array(*bias)

    def f(q, k, v, bias, sinks, masks, key):
        out, lse = attention(
            q, k, v, mask=Mask(causal=True, window=window, **masks), bias=bias, sinks_N=sinks, return_lse=True,
            implementation="mosaic_tpu", dropout_key=key if dropping else None, **call,
        )  # fmt: skip
        return jnp.square(out.astype(jnp.float32)).sum() + lse.sum()

    given = (array(B, T, N, H), array(B, S, K, H), array(B, S, K, H), bias, sinks)
    if backward:
        f = jax.grad(f, [i for i, x in enumerate(given) if x is not None])
    with compiling_for("tpu", device.device_kind):
        lowered = jax.jit(f).trace(*given, masks, array(2, dtype=jnp.uint32)).lower(lowering_platforms=("tpu",))
    return lowered.compile()


CALLS = {
    "causal": dict(),
    "head width 64": dict(H=64),
    "head width 256": dict(H=256, T=512, S=512),
    "float32": dict(dtype=jnp.float32),
    "packed, positions, lengths, prefix": dict(
        T=700, fields=("q_segments_BT", "kv_segments_BS", "q_positions_BT", "kv_lengths_B", "prefix_lengths_B")
    ),
    "window, soft cap, sinks, dropout": dict(window=(256, 0), softcap=5.0, sinks=True, dropout_rate=0.1),
    "dropout by positions, dense": dict(T=512, S=512, fields=("kv_positions_BS", "dense_BNTS"), dropout_rate=0.1),
    "bias": dict(bias=(1, 4, 1024, 1024)),
    "bias of keys": dict(bias=(2, 1, 1, 1024)),
    "bias of queries": dict(bias=(1, 4, 1024, 1)),
    "bucket bias": dict(bias="table"),
    "one query on a cache": dict(T=1, S=8192, N=16, K=2, fields=("kv_lengths_B", "q_positions_BT"), backward=False),
    "keys longer than the chip keeps": dict(B=1, S=32768, N=1, K=1),
}


# Every call on the oldest generation, on the others those that are hardest to fit.
HARDEST = "window, soft cap, sinks, dropout", "bucket bias"
ALWAYS = ("v5e:2x2", "causal"), ("v5e:2x2", HARDEST[0]), ("v5e:2x2", "one query on a cache")
COMPILED = [(topology, name) for topology in TOPOLOGIES for name in (CALLS if topology == "v5e:2x2" else HARDEST)]


@pytest.mark.parametrize("topology, name", long_but(ALWAYS, COMPILED))
def test_compiles(topology, name, devices):
    device = devices[topology]
    assert device.device_kind == TOPOLOGIES[topology]
    text = compiled(device, **CALLS[name]).as_text()
    passes = {"attention_forward"}
    if CALLS[name].get("backward", True):
        passes.add("attention_backward")
    if "bias" in CALLS[name]:
        passes.add("attention_bias_gradient")
    for which in ("attention_forward", "attention_backward", "attention_bias_gradient"):
        assert (f"{which}" in text) == (which in passes), which
    assert "tpu_custom_call" in text


def test_compiles_on_a_mesh(devices):
    """Four chips, rows over one axis and heads over the other, each running the kernels on its own part."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(np.array(chips).reshape(2, 2), ("data", "tensor"), axis_types=axes)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    x = jax.ShapeDtypeStruct((4, 512, 4, 128), jnp.bfloat16, sharding=split)

    def loss(q, k, v):
        out = sharded_attention(q, k, v, mask=Mask(causal=True), implementation="mosaic_tpu")
        return jnp.square(out.astype(jnp.float32)).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), compiling_for("tpu", chips[0].device_kind):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    assert "attention_backward" in text
    assert "all-gather" not in text and "bf16[2,512,256]" in text  # a chip's rows, and its heads side by side


def test_what_does_not_fit_is_refused_by_the_compiler(monkeypatch, devices):
    """The check above can fail."""
    monkeypatch.setattr(tile, "VMEM_BYTES", 2**20)
    with pytest.raises(Exception, match="(?i)vmem"):
        compiled(devices["v5e:2x2"])


SAFETY = {
    "packed, dropout, several blocks": Mask(causal=True),
    "window, lengths": Mask(window=(40, 3), kv_lengths_B=jnp.asarray([260, 17])),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SAFETY)
def test_no_races_and_nothing_out_of_bounds(name):
    """In the interpreter that runs grid steps on two cores, raises out of bounds and fills memory with NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    rng, (B, T, S, N, K, H) = np.random.default_rng(0), (2, 140, 260, 2, 1, 32)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, N, H), *[(B, S, K, H)] * 2, (B, T, N, H))
    )
    mask, rate = SAFETY[name], 0.2 if "dropout" in name else 0.0
    if "packed" in name:
        segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, S)), axis=1))
        mask = dataclasses.replace(mask, q_segments_BT=segments[:, -T:], kv_segments_BS=segments)

    def gradients(implementation):
        def loss(q, k, v):
            out = attention(
                q, k, v, mask=mask, dropout_rate=rate, dropout_key=jax.random.key(1) if rate else None,
                implementation=implementation,
            )  # fmt: skip
            return (out * weight).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    blocks = Blocks(128, 128)
    with (
        compiling_for("tpu", "interpreter", interpret=parameters),
        using("mosaic_tpu", forward=blocks, backward=blocks),
    ):
        got = jax.device_get(gradients("mosaic_tpu"))
    assert interpreter.races.races_found is False
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("reference"))):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=3e-5)


PAIRED = [
    "full", "causal", "window", "causal window", "lengths", "prefix", "packing", "positions", "dense",
    "packing, restarted, window", "window, more queries", "causal, more queries, sinks", "prefix, cache, window",
    "no keys seen", "everything", "everything with buckets",
]  # fmt: skip


@pytest.mark.parametrize("major", ["q", "k"])
def test_pairs_visit_all_that_is_visible_once(major):
    """Against the oracle's matrix of what is visible, over the masks of the conformance table."""
    skipped = unmasked = 0
    for name in PAIRED:
        c = CASES[name]
        _, mask, _ = inputs(c)
        plan = Plan(c.B, c.T, c.S, c.K, c.N // c.K, rows=c.B, heads=c.K, q_block=4, k_block=4)
        entries, steps = tile.pairs(plan, mask, major)
        entries, steps = np.asarray(entries), int(steps)
        seen = oracle.visible(mask, c.B, c.N, c.T, c.S)[0]
        seen = np.broadcast_to(seen, (c.B, c.N, c.T, c.S))
        for b in range(c.B):
            row = entries[b if len(entries) > 1 else 0]
            i, j = row >> 18, row >> 4 & 0x3FFF
            works, masked = row & tile.WORK != 0, row & tile.MASKED != 0
            worked = list(zip(i[works], j[works]))
            assert len(set(worked)) == len(worked), name
            for a in range(plan.q_blocks):
                for d in range(plan.k_blocks):
                    block = seen[b, :, 4 * a : 4 * a + 4, 4 * d : 4 * d + 4]
                    assert (a, d) in worked or not block.any(), (name, b, a, d)
                    skipped += (a, d) not in worked
            for a, d in zip(i[works & ~masked], j[works & ~masked]):
                block = seen[b, :, 4 * a : 4 * a + 4, 4 * d : 4 * d + 4]
                assert block.all() and block.shape[-1] == 4, (name, b, a, d)
                unmasked += 1
            assert not works[steps:].any(), name
            # Every outer block has one first and one last entry, and what lies between them belongs to it.
            outer = i if major == "q" else j
            count = plan.q_blocks if major == "q" else plan.k_blocks
            assert outer[row & tile.FIRST != 0].tolist() == list(range(count)), name
            assert outer[row & tile.LAST != 0].tolist() == list(range(count)), name
            assert (np.diff(outer) >= 0).all(), name
    assert skipped > 100 and unmasked > 20, (skipped, unmasked)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 12), (16, 20)])
def test_intervals_are_the_buckets(bidirectional, buckets, max_distance):
    """Every relative position lies in the interval of the oracle's bucket and in no other."""
    intervals = BucketBias(jnp.zeros((buckets, 2)), bidirectional, max_distance).intervals()
    for relative in [*range(-300, 301), -(2**20), 2**20]:
        inside = [r for r, (low, high) in enumerate(intervals) if low <= relative <= high]
        want = oracle.bucket(relative, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
        assert inside == [want], relative
