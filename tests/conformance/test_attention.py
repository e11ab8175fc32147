"""Every case of the conformance table on every implementation, random masks, and mutants that must be caught."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.attention import Mask
from tests.conformance import attention as table
from tests.conformance.attention import CASES, LACKING, VARIANTS, Case, judge

blockwise, blocks, dropout, reference, gpu_tiles, mosaic_tpu, tile, tpu_backward = (
    importlib.import_module(f"llm.attention.{name}")
    for name in (
        "blockwise",
        "blocks",
        "dropout",
        "reference",
        "mosaic_gpu_tiles",
        "mosaic_tpu",
        "mosaic_tpu_tile",
        "mosaic_tpu_backward",
    )
)


# Compiled kernels run where their device is, and `-m gpu` and `-m tpu` choose them.
ON_DEVICE = {
    "mosaic_tpu": pytest.mark.tpu, "mosaic_gpu": pytest.mark.gpu, "mosaic_gpu in bfloat16": pytest.mark.gpu,
    "cudnn": pytest.mark.gpu,
}  # fmt: skip


def marks(name: str, variant: str):
    if variant in ON_DEVICE:
        return ON_DEVICE[variant]
    return {"always": (), "long": pytest.mark.long, "slow": pytest.mark.slow}[table.when(name, variant)]


RUNS = [
    pytest.param(name, variant, marks=marks(name, variant), id=f"{name}-{variant}")
    for name, case in CASES.items()
    for variant in VARIANTS
    if table.in_reach(case, variant)
]


@pytest.mark.parametrize("name, variant", RUNS)
def test_case(name, variant):
    try:
        judge(CASES[name], variant)
    except table.NotHere as error:
        pytest.skip(str(error))
    except table.Lacking:
        pass  # counted below


@pytest.mark.parametrize("variant", LACKING)
def test_coverage_does_not_shrink(variant):
    """The number of cases that an implementation refuses is the committed one, wherever the test runs."""
    lacking = [name for name, case in CASES.items() if refused(case, variant)]
    assert len(lacking) == LACKING[variant], lacking


def refused(case: Case, implementation: str) -> bool:
    arrays, mask, _ = table.inputs(case)
    more = {name: x for name, x in arrays.items() if name not in "qkv"}
    how = dict(
        scale=case.scale, softcap=case.softcap, dropout_rate=case.rate, dropout_key=table.KEY if case.rate else None
    )
    call = lambda q, k, v, more: table.attention(  # noqa: E731
        q, k, v, mask=mask, implementation=implementation, return_lse=case.lse, **more, **how
    )
    try:
        jax.eval_shape(call, arrays["q"], arrays["k"], arrays["v"], more)
    except NotImplementedError as error:
        why = table.why_not_here(implementation)
        return why is None or why not in str(error)
    return False


def test_axes_are_told_apart():
    """Sizes are pairwise distinct, so that an exchange of axes cannot pass; only self-attention has T = S."""
    for name, c in CASES.items():
        sizes = (c.B, c.T, c.N, c.K, c.H, *([c.S] if c.S != c.T else []))
        assert len(set(sizes)) == len(sizes), (name, sizes)


def test_parts_of_every_kind_are_covered():
    """Among the cases in small blocks: all in one part, several rows a part, a row a part, some heads a part."""
    kinds = set()
    with table.small_blocks():
        for c in CASES.values():
            plan = blockwise._plan(c.B, c.T, max(c.S, 1), c.K, c.N // c.K, blockwise.SCORES_ON_CPU)
            if plan.heads < c.K:
                kinds.add("one head" if plan.heads == 1 else "some heads")
            else:
                kinds.add("all" if plan.rows == c.B else "one row" if plan.rows == 1 else "some rows")
    assert kinds == {"one head", "some heads", "all", "one row", "some rows"}, kinds


# The same draws every time: where plain XLA happens to be exact to the bit, four roundings are too few for a new draw.
@pytest.mark.long
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_random_masks(data):
    draw = data.draw
    case = Case(
        B=draw(st.integers(1, 2)), T=draw(st.sampled_from([1, 3, 9])), S=draw(st.sampled_from([2, 13, 17])),
        N=4, K=draw(st.sampled_from([1, 2])), H=5, Hv=7, sinks=draw(st.booleans()),
        rate=draw(st.sampled_from([0.0, 0.3])), bias=draw(st.sampled_from([None, "table"])),
    )  # fmt: skip
    side = st.one_of(st.none(), st.integers(0, 12))
    static = {"causal": draw(st.booleans()), "window": draw(st.one_of(st.none(), st.tuples(side, side)))}
    present = {name for name in ("segments", "lengths", "prefix", "q positions", "k positions") if draw(st.booleans())}

    def make(rng, c):
        fields = dict(static)
        if "segments" in present:
            fields["q_segments_BT"] = jnp.asarray(rng.integers(0, 3, (c.B, c.T)))
            fields["kv_segments_BS"] = jnp.asarray(rng.integers(0, 3, (c.B, c.S)))
        if "lengths" in present:
            fields["kv_lengths_B"] = jnp.asarray(rng.integers(0, c.S + 1, c.B))
        if "prefix" in present:
            fields["prefix_lengths_B"] = jnp.asarray(rng.integers(0, c.S + 1, c.B))
        if "q positions" in present:
            fields["q_positions_BT"] = jnp.asarray(rng.integers(-2, c.S + 2, (c.B, c.T)))
        if "k positions" in present:
            fields["kv_positions_BS"] = jnp.asarray(rng.integers(0, c.S + 2, (c.B, c.S)))
        return Mask(**fields)

    case, seed = dataclasses.replace(case, mask=make), draw(st.integers(0, 2**16))
    for variant in ("reference", "blockwise in small blocks"):
        judge(case, variant, seed)


# --- mutants ----------------------------------------------------------------------------------------------------------


def window_is_dropped(original):
    return lambda mask, *rest: original(dataclasses.replace(mask, window=None), *rest)


def lane_is_wrong(original):
    return lambda words, rate, b, n, q, k: original(words, rate, b, n, q, k ^ 1)


def heads_are_tiled(original):
    return lambda q, k, *rest: original(q, jnp.take(k, jnp.arange(q.shape[2]) % k.shape[2], axis=2), *rest)


def earlier_output_is_not_shrunk(original):
    def mutant(*arguments, **how):
        p, shrink, top, total = original(*arguments, **how)
        return p, jnp.ones_like(shrink), top, total

    return mutant


def last_key_block_is_skipped(original):
    return lambda plan, g: original(plan, g) & (np.arange(plan.k_blocks) < plan.k_blocks - 1)[None, :, None]


def bias_is_lost_in_the_backward_pass(original):
    return lambda plan, g, bias, dbias, ds, i, j: dbias


def run_starts_a_group_late(original):
    return lambda words, rate, b, n, q, first, count, axis: original(words, rate, b, n, q, first + 4, count, axis)


def rule_forgets_the_window(original):
    return lambda mask, *rest: original(dataclasses.replace(mask, window=None), *rest)


def last_pair_is_left_out(original):
    def mutant(*arguments, **how):
        entries, steps = original(*arguments, **how)
        return entries & ~(tile.WORK * (jnp.arange(entries.shape[1]) == steps - 1)), steps

    return mutant


def every_pair_is_taken_for_whole(original):
    return lambda plan, g: original(plan, g) | True


def words_are_shifted(original):
    return lambda words, b, n, q, k: original(words, b, n, q, k + 1)


def words_are_exchanged(original):
    return lambda counter, key: original(counter, key)[::-1]


def groups_are_interleaved(original):
    return lambda plan, n: jax.lax.rem(n, plan.key_heads)


def bias_gradient_of_the_first_row_only(original):
    return lambda call, plan, mask, bias, words, k, v, rows: original(
        call, dataclasses.replace(plan, batch=1), mask, bias, words, k, v, rows
    )


def last_block_is_left_out(original):
    def mutant(*arguments, **how):
        order, counts = original(*arguments, **how)
        return order, jnp.minimum(counts, jnp.maximum(counts[..., 1:] - 1, 0))

    return mutant


def delta_is_lost(original):
    return lambda p, dp, delta, *rest, **how: original(p, dp, 0 * delta, *rest, **how)


def gradient_of_the_lse_is_lost(original):
    mutant = jax.custom_vjp(original.fun, nondiff_argnums=(0,))
    mutant.defvjp(
        blockwise._forward,
        lambda plan, saved, cotangents: blockwise._backward(plan, saved, (cotangents[0], 0 * cotangents[1])),
    )
    return mutant


MUTANTS = {
    "reference": [
        (reference, "visible", window_is_dropped),
        (dropout, "keep", lane_is_wrong),
        (reference, "_weights_and_lse", heads_are_tiled),
    ],
    "blockwise in small blocks": [
        (blocks, "weigh", earlier_output_is_not_shrunk),
        (blocks, "needed", last_key_block_is_skipped),
        (blocks, "visible", window_is_dropped),
        (blockwise, "_add_bias_gradient", bias_is_lost_in_the_backward_pass),
        (blockwise, "_attend", gradient_of_the_lse_is_lost),
        (dropout, "keep_run", run_starts_a_group_late),
    ],
    "mosaic_tpu interpreted in small blocks": [
        (blocks, "weigh", earlier_output_is_not_shrunk),
        (blocks, "needed", last_key_block_is_skipped),
        (blocks, "whole", every_pair_is_taken_for_whole),
        (tile, "rule", rule_forgets_the_window),
        (tile, "pairs", last_pair_is_left_out),
        (dropout, "bits", words_are_shifted),
        (mosaic_tpu, "key_head", groups_are_interleaved),
        (tpu_backward, "key_head", groups_are_interleaved),
        (tpu_backward, "_bias_gradient", bias_gradient_of_the_first_row_only),
    ],
}
# Those that are caught always; the long tests catch the others.
ALWAYS = {
    "reference": {"visible", "keep", "_weights_and_lse"},
    "blockwise in small blocks": {"weigh", "_attend", "keep_run"},
    "mosaic_tpu interpreted in small blocks": {"rule", "pairs"},
}
# A judgement by the GPU's interpreter takes ten seconds and more, so these are slow tests.
GPU_MUTANTS = [
    (gpu_tiles, "weigh", earlier_output_is_not_shrunk, "long"),
    (gpu_tiles, "rule", rule_forgets_the_window, "causal window"),
    (gpu_tiles, "lists", last_block_is_left_out, "full"),
    (gpu_tiles, "score_gradient", delta_is_lost, "full"),
    (blocks, "whole", every_pair_is_taken_for_whole, "causal"),
    (dropout, "philox_4x32", words_are_exchanged, "dropout"),
]
CATCHERS = {
    "visible": "causal window",
    "keep": "dropout",
    "_weights_and_lse": "full",
    "weigh": "full",
    "needed": "full",
    "_add_bias_gradient": "bias",
    "_attend": "full",
    "keep_run": "dropout",
    "whole": "causal",
    "rule": "causal window",
    "pairs": "full",
    "bits": "dropout",
    "key_head": "full",
    "_bias_gradient": "bias of all rows, dropout",
}
# The same for a few queries against a cache, which blockwise reads by another path.
DECODE_MUTANTS = [
    (blocks, "weigh", earlier_output_is_not_shrunk),
    (blocks, "needed", last_key_block_is_skipped),
    (blocks, "visible", window_is_dropped),
]


@pytest.mark.parametrize(
    "variant, module, name, mutate, catcher",
    [
        pytest.param(
            variant, *mutant, CATCHERS[mutant[1]], marks=[] if mutant[1] in ALWAYS[variant] else pytest.mark.long
        )
        for variant, mutants in MUTANTS.items()
        for mutant in mutants
    ]
    + [
        pytest.param("blockwise in small blocks", *mutant, "decode, one key head, window", marks=pytest.mark.long)
        for mutant in DECODE_MUTANTS
    ]
    + [pytest.param("mosaic_gpu interpreted in bfloat16", *mutant, marks=pytest.mark.slow) for mutant in GPU_MUTANTS],
)
def test_mutants_are_caught(monkeypatch, variant, module, name, mutate, catcher):
    judge(CASES[catcher], variant)
    monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    jax.clear_caches()
    try:
        with pytest.raises(AssertionError):
            judge(CASES[catcher], variant)
    finally:
        jax.clear_caches()
