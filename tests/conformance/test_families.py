"""Every column of the families' conformance table (`families.py`) on every row that takes it.

Everything is jitted, float32 on one CPU device unless it says bfloat16; bit-equality is claimed in that scope, for
calls of one compiled function.
"""

import dataclasses
import itertools
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import models
from llm.attention import relative_position_bucket
from llm.models import FAMILIES
from llm.nn import recurrent
from llm.nn.mixture_of_experts import ExpertSettings, MixtureOfExperts
from llm.nn.norm import Norm
from llm.training import losses
from tests.attention import oracle
from tests.conformance import families as table
from tests.conformance.families import JUNK, ROWS, SOURCE_BS, TOKENS_BT, B, S, T, batch, close, runs, same
from tests.goldens import families as goldens


def column(name: str):
    """Parametrises a test over the rows that take a column; tests of one row run one after the other."""
    return pytest.mark.parametrize("name", table.taking(name), indirect=True)


@pytest.fixture(scope="module")
def name(request):
    return request.param


def test_the_table_does_not_shrink():
    assert {column: len(table.taking(column)) for column in table.COLUMNS} == table.COUNTS
    assert {type(row.spec) for row in ROWS.values()} == {family.spec for family in FAMILIES.values()}
    for name, row in ROWS.items():
        assert set(row.lacks) <= set(table.COLUMNS), name
        rates = list(table.rates(row.spec).values())
        assert all(rates) and len(set(rates)) == len(rates), (name, "every rate is set and told apart")


# --- 1: who hears of whom ---------------------------------------------------------------------------------------------


@column("causality")
def test_causality_by_gradient(name):
    row = ROWS[name]
    found = table.look(name)(table.parameters(name), batch(row))
    for tokens, source in zip(TOKENS_BT, SOURCE_BS):
        np.testing.assert_array_equal(found.influence_TV[:, tokens] > 1e-9, table.seen(row))
        heard = np.asarray(found.influence_TV[:, source])
        # A decoder sees all of its source; where there is none, these ids stand nowhere.
        assert (heard > 1e-9).all() if row.reads_source else (heard == 0).all()
    np.testing.assert_array_equal(found.influence_TV[:, JUNK], 0)


def test_windows_go_to_their_layers_in_turn():
    """gpt3: with the other half's attention silenced, the odd layers see three places back, the even ones all."""
    params = table.parameters("gpt3")
    for block, reach in (("block_0", 2 * 3), ("block_1", None)):
        silenced = jax.tree.map(np.copy, params)
        for leaf in silenced["stack"]["layers"][block]["attention"]["output"].values():
            leaf[:] = 0
        found = table.look("gpt3")(silenced, batch(ROWS["gpt3"]))
        row = dataclasses.replace(ROWS["gpt3"], reach=reach)
        np.testing.assert_array_equal(found.influence_TV[:, TOKENS_BT[0]] > 1e-9, table.seen(row))


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_a_prefix_is_seen_by_all(name):
    row = ROWS[name]
    lengths = np.array([5, 0], np.int32)
    found = table.look(name)(table.parameters(name), batch(row) | {"prefix_lengths": lengths})
    t, s = np.arange(T)[:, None], np.arange(T)
    for tokens, length in zip(TOKENS_BT, lengths):
        one = (s <= t) | (s < length)
        if row.reach is not None:  # a layer's window holds in the prefix too, on the left
            one &= s >= t - row.reach // row.spec.layers
            one = one.astype(int) @ one > 0
        np.testing.assert_array_equal(found.influence_TV[:, tokens] > 1e-9, one)


# --- 2: padding -------------------------------------------------------------------------------------------------------


@column("padding")
def test_padding_changes_nothing(name):
    row, params = ROWS[name], table.parameters(name)
    one, other = (table.look(name)(params, table.padded(row, junk=junk)) for junk in (0, 5))
    if getattr(row.spec, "experts", 0):  # an expert's tokens then stand at other places of its sums
        close(other.gradients, one.gradients, 1e-6)
        other = other._replace(gradients=one.gradients)
    same(other, one)
    np.testing.assert_array_equal(one.influence_TV[:, JUNK], 0)
    # The first row without its padding, and without the keys that say where it is.
    n, m = table.LENGTHS[0], table.SOURCE_LENGTHS[0]
    short = {
        key: x[:1, : m if key.startswith("source") else n]
        for key, x in batch(row).items()
        if not key.endswith(("segments", "positions"))
    }
    hidden, heads = table.bare(name)(params, short)
    close(one.hidden[:1, :n], hidden, 1e-5)
    for key, x in one.heads.items():
        close(x[:1, :n] if key in table.OF_PLACES else x[:1], heads[key], 1e-5)
    # Both rows with their padding on the left.
    hidden, heads = table.bare(name)(params, table.on_the_left(table.padded(row)))
    for number, length in enumerate(table.LENGTHS):
        close(hidden[number, T - length :], one.hidden[number, :length], 1e-5)
        for key in one.heads:
            mine, places = one.heads[key][number], key in table.OF_PLACES
            close(heads[key][number][T - length if places else 0 :], mine[: length if places else None], 1e-5)


@column("padding")
def test_a_row_of_padding_is_finite_and_its_neighbour_the_same(name):
    row, params = ROWS[name], table.parameters(name)
    found = table.look(name)(params, table.padded(row, (7, 0), (5, 0)))
    table.finite(found)
    assert not np.asarray(found.hidden[1]).any()
    full = table.look(name)(params, table.padded(row))
    same(found.hidden[0], full.hidden[0])
    same({key: x[0] for key, x in found.heads.items()}, {key: x[0] for key, x in full.heads.items()})
    np.testing.assert_array_equal(found.influence_TV[:, TOKENS_BT[0]], full.influence_TV[:, TOKENS_BT[0]])


# --- 3: packing -------------------------------------------------------------------------------------------------------


@column("packing")
@pytest.mark.parametrize("lengths, source_lengths", [((5, 6), (4, 4)), ((1, 11), (8, 1))], ids=["padded", "filled"])
def test_packed_documents_are_alone(name, lengths, source_lengths):
    """Two documents in row 0; row 1 is another one."""
    row, params, run = ROWS[name], table.parameters(name), table.look(name)
    parts, source_parts = ([slice(0, a), slice(a, a + b)] for a, b in (lengths, source_lengths))

    def packed_with(tokens, source):
        segments = [runs(*lengths, length=T), runs(T, length=T)]
        source_segments = [runs(*source_lengths, length=S), runs(S, length=S)]
        return run(params, batch(row, segments, source_segments, tokens, source))

    packed = packed_with(TOKENS_BT, SOURCE_BS)
    tokens, source = np.resize(JUNK, (B, T)), np.resize(JUNK, (B, S))
    for number, (part, source_part) in enumerate(zip(parts, source_parts)):
        tokens[number, : lengths[number]] = TOKENS_BT[0, part]
        source[number, : source_lengths[number]] = SOURCE_BS[0, source_part]
    segments, source_segments = [runs(n, length=T) for n in lengths], [runs(n, length=S) for n in source_lengths]
    alone = run(params, batch(row, segments, source_segments, tokens, source))
    for number, (part, source_part) in enumerate(zip(parts, source_parts)):
        close(packed.hidden[0, part], alone.hidden[number, : lengths[number]], 1e-5)
        # By gradient: within a document as in a row of its own, across exactly nothing.
        here, mine, spoken = np.asarray(packed.influence_TV)[part], TOKENS_BT[0, part], SOURCE_BS[0, source_part]
        np.testing.assert_array_equal(here[:, mine] > 1e-9, table.seen(row)[: len(mine), : len(mine)])
        np.testing.assert_array_equal(here[:, np.setdiff1d(TOKENS_BT[0], mine)], 0)
        if row.reads_source:
            assert (here[:, spoken] > 1e-9).all()
            np.testing.assert_array_equal(here[:, np.setdiff1d(SOURCE_BS[0], spoken)], 0)

    # By change of a token of the first document, and of its source.
    end = lengths[0] - 1
    tokens, source = TOKENS_BT.copy(), SOURCE_BS.copy()
    tokens[0, end], source[0, 0] = JUNK[:2]
    for changed in [(tokens, SOURCE_BS)] + [(TOKENS_BT, source)] * row.reads_source:
        again = packed_with(*changed)
        same(again.hidden[0, end + 1 :], packed.hidden[0, end + 1 :])
        same(again.hidden[1], packed.hidden[1])
        assert np.abs(again.hidden[0, end] - packed.hidden[0, end]).max() > 1e-3


# --- 4: dropout -------------------------------------------------------------------------------------------------------


@column("dropout")
def test_dropout(name):
    row, params = ROWS[name], table.parameters(name)
    rates = table.rates(row.spec)
    one = batch(row)
    twins = {key: np.repeat(x[:1], B, axis=0) for key, x in one.items()}  # two equal rows
    run = table.dropped(name)
    numbers = [1, 1, *range(2, 8)]
    keys = jax.vmap(jax.random.key)(jnp.array(numbers))
    hidden, heads, seen = run(params, twins, keys, np.ones((len(numbers), len(rates)), bool))
    table.finite(hidden)

    masks = table.masks_of(seen)
    counted = dict.fromkeys(rates, 0)
    for where, mask in masks.items():
        if name.startswith("rnn") and mask.ndim == 4:  # one mask for all times
            np.testing.assert_array_equal(mask, np.broadcast_to(mask[:, :, :1], mask.shape), err_msg=where)
            masks[where] = mask = mask[:, :, 0]
        kept = np.unique(mask).tolist()
        field = next(field for field, rate in rates.items() if kept == [0, np.float32(1 / (1 - rate))])
        counted[field], rate = counted[field] + 1, rates[field]
        share = (mask[1:] != 0).mean()
        assert abs(share - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask[1:].size), (where, share)
        np.testing.assert_array_equal(mask[0], mask[1], err_msg=where)  # the same key
        assert table.unlike(mask[1:], np.roll(mask[1:], 1, axis=0)), where  # other keys
        assert table.unlike(mask[1:, 0], mask[1:, 1]), where  # rows
    for (a, x), (b, y) in itertools.combinations(masks.items(), 2):  # places in the model, layers among them
        assert x.shape != y.shape or table.unlike(x[1:], y[1:]), (a, b)
    assert counted == row.sites, sorted(masks)
    np.testing.assert_array_equal(hidden[0], hidden[1])

    # Each rate alone, by the gates; attention's always acts.
    silent = run(params, twins, keys, np.zeros((len(numbers), len(rates)), bool))[0]
    still = table.look(name)(params, twins)
    np.testing.assert_array_equal(still.hidden[0], still.hidden[1])
    on_attention = "attention_dropout" in rates or type(row.spec) in (models.GPTSpec, models.T5Spec)
    if on_attention:
        moved = np.abs(silent - still.hidden).max((-1, -2))  # (keys, B)
        assert (moved > 1e-3).all()
        np.testing.assert_array_equal(silent[0], silent[1])
        assert np.abs(silent[1:, 0] - silent[1:, 1]).max((-1, -2)).min() > 1e-3  # rows
        assert np.abs(silent[1] - silent[2]).max() > 1e-3  # keys
    else:
        for x in silent:
            close(x, still.hidden, 1e-5)
    for field in rates:
        if field != "attention_dropout":
            gates = np.array([[field == other for other in rates]] * len(numbers))
            alone = run(params, twins, keys, gates)[0]
            assert (np.abs(alone - silent).max((-1, -2)) > 1e-3).all(), field
    for key in ("classify",) if "classify" in heads else ():
        assert np.abs(heads[key][1] - heads[key][2]).max() > 1e-3


@pytest.mark.parametrize(
    "name, changes, numbers", [("gpt2", {"layers": 3}, 3), ("encdec post-norm", {}, 6), ("t5 1.0", {}, 6)]
)
def test_every_layer_has_its_own_dropout_on_attention_weights(name, changes, numbers, monkeypatch):
    """Attention that gives one number of its key, whatever it is asked: the numbers of all layers differ.

    An encoder, a decoder and its look at the source are layers each by itself.
    """
    from llm.nn import multi_head_attention as module

    def number(q, k, v, *, dropout_key, **how):
        return jnp.broadcast_to(jax.random.uniform(dropout_key), q.shape)

    monkeypatch.setattr(module, "attention", number)
    model = models.build(dataclasses.replace(ROWS[name].spec, **changes))
    one = {key: x[:1] for key, x in batch(ROWS[name]).items()}

    def run(key):
        rngs = {"dropout": key, "params": jax.random.key(0)}
        make = lambda m: m(one, train=True)  # noqa: E731
        catch = lambda module, _: module.name == "output"  # noqa: E731
        _, made = model.init_with_output(rngs, method=make, capture_intermediates=catch)
        flat = flax.traverse_util.flatten_dict
        kernels = {path: x for path, x in flat(nn.unbox(made["params"])).items() if path[-2:] == ("output", "kernel")}
        caught = flat(made["intermediates"])
        said = {path[:-1]: x for path, (x,) in caught.items() if path[-1] == "__call__"}  # (L, B, T, D)
        assert said.keys() == {path[:-1] for path in kernels}
        # (L, N, H, D) kernels add up N x H times the number.
        return [(said[path[:-1]] / x.sum((1, 2))[:, None, None]).mean((1, 2, 3)) for path, x in kernels.items()]

    found = np.concatenate(table.quick(jax.vmap(run))(jnp.stack([jax.random.key(1), jax.random.key(2)])), axis=1)
    assert found.shape == (2, numbers) and len({round(x, 4) for x in found.ravel().tolist()}) == 2 * numbers, found


# --- 5: bfloat16 ------------------------------------------------------------------------------------------------------


@column("bfloat16")
def test_bfloat16_computes_over_float32_parameters(name):
    row, params = ROWS[name], table.parameters(name)
    assert {x.dtype.name for x in jax.tree.leaves(table.shapes(name))} == {"float32"}
    one = batch(row)
    hidden, heads = table.half(name)(params, one)
    exact = table.look(name)(params, one)
    assert hidden.dtype == jnp.bfloat16
    assert {x.dtype.name for x in heads.values()} == {"float32"} and set(heads) == set(row.heads)
    pairs = [(hidden, exact.hidden), *((heads[key], exact.heads[key]) for key in heads)]
    for got, want in pairs:
        error = np.abs(np.asarray(got, np.float32) - want)
        assert error.max() > 0  # it did compute in bfloat16
        # The median: close probabilities of two experts may be exchanged in a few places.
        assert np.median(error) < 0.02 * np.abs(want).max(), (np.median(error), np.abs(want).max())


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_statistics_of_norms_are_float32(kind):
    """A large mean, on which bfloat16's own statistics lose all of the deviation; the truth is float64's."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(96 + rng.normal(size=(5, 16)), jnp.bfloat16)
    scale = rng.normal(size=16).astype(np.float32)
    params = {"scale": scale} | ({"bias": np.zeros(16, np.float32)} if kind == "layer" else {})
    got = jax.jit(lambda p, x: Norm(kind, dtype=jnp.bfloat16).apply({"params": p}, x))(params, x)
    assert got.dtype == jnp.bfloat16
    y = np.asarray(x, np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    want = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


@column("far positions")
def test_far_positions_are_told_apart_in_bfloat16(name):
    """From place 1000 on, where bfloat16 counts in fours."""
    row, params = ROWS[name], table.parameters(name)
    run = table.half(name)
    if isinstance(row.spec, models.T5Spec):
        # Exactly the buckets of the published table, as they stand in the biases of the model (CASES: C11).
        relative = [-200, -128, -64, -32, -16, -8, -7, -1, 0, 1, 7, 8, 16, 32, 64, 128]
        both = [15, 15, 14, 12, 10, 8, 7, 1, 0, 17, 23, 24, 26, 28, 30, 31]
        causal = [31, 31, 26, 21, 16, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0]
        spec = dataclasses.replace(row.spec, dtype="bfloat16", buckets=32, max_distance=128)
        model = models.build(spec)
        table_RN = np.arange(32.0, dtype=np.float32)[:, None] + np.zeros(4, np.float32)
        weights = {side: {"table": table_RN} for side in ("encoder_bias", "decoder_bias")}
        for side, bidirectional, want in (("encoder", True, both), ("decoder", False, causal)):
            at = lambda m, q, k: m._bias(side, bidirectional).at(q, k)  # noqa: B023, E731
            got = model.apply({"params": weights}, jnp.array([[1000]]), 1000 + jnp.array([relative]), method=at)
            np.testing.assert_array_equal(got[0, :, 0], [want] * 4)
            np.testing.assert_array_equal(
                relative_position_bucket(np.array(relative), bidirectional=bidirectional, xp=np), want
            )
        return
    one = batch(row)
    far = one | {key: x + 1000 for key, x in one.items() if key.endswith("positions")}
    if row.reads_source:
        # Sinusoids: alike tokens would all be one but for their places.
        alike = {key: np.ones_like(x) if key.endswith("tokens") else x for key, x in far.items()}
        hidden = np.asarray(run(params, alike)[0], np.float32)[0]
        assert np.abs(np.diff(hidden, axis=0)).max(-1).min() > 0.05
        return
    # Rotary: only distances count, and they do.
    near, moved, apart = (
        np.asarray(run(params, one | {"positions": positions})[0], np.float32)
        for positions in (one["positions"], far["positions"], 4 * one["positions"])
    )
    error, effect = np.abs(moved - near).mean(), np.abs(apart - near).mean()
    assert error < 0.01 and effect > 4 * error, (error, effect)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].heads == ("unembed",)], indirect=True)
def test_logits_by_hand(name):
    """Products with the token table, T5 1.0's divided by sqrt(D), or with a matrix of their own (CASES: C10)."""
    row, params = ROWS[name], table.parameters(name)
    found = table.look(name)(params, batch(row))
    own = params.get("unembedding_projection")
    assert (own is None) == getattr(row.spec, "tied", True)
    matrix_DV = params["embed"]["table"].T if own is None else own["kernel"]
    scale = 16**-0.5 if name == "t5 1.0" else 1.0
    close(found.heads["unembed"], scale * np.asarray(found.hidden, np.float64) @ matrix_DV, 1e-5)


def test_attention_of_t5_by_hand():
    """Scores are not divided; a stack's bias is of key minus query and of all its layers; the source has none."""
    row, params = ROWS["t5 1.0"], table.parameters("t5 1.0")
    kinds = ("query", "key", "value", "attention", "cross_attention")
    run = lambda params, batch: models.build(row.spec).apply(  # noqa: E731
        {"params": params}, batch, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in kinds,
    )[1]["intermediates"]  # fmt: skip
    caught = table.quick(run)(params, batch(row))
    how = dict(buckets=row.spec.buckets, max_distance=row.spec.max_distance)
    for side, kind in (("encoder", "attention"), ("decoder", "attention"), ("decoder", "cross_attention")):
        layers, kernels = caught[side]["layers"][kind], params[side]["layers"][kind]["output"]["kernel"]
        for layer in range(2):
            q, k, v = (np.asarray(layers[part]["__call__"][0][layer, 0], np.float64) for part in kinds[:3])
            scores = np.einsum("tnh,snh->nts", q, k)
            if kind == "attention":
                at = np.arange(len(q))[None]
                table_RN = params[f"{side}_bias"]["table"]
                scores += oracle.bucket_bias(table_RN, at, at, bidirectional=side == "encoder", **how)[0][0]
                scores += np.where((at > at.T) & (side == "decoder"), -np.inf, 0)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            want = np.einsum("nts,snh,nhd->td", weights, v, kernels[layer])
            close(layers["__call__"][0][0][layer, 0], want, 1e-5)


def test_experts_by_hand():
    """Each token through its two likeliest experts, weighed by their shares; the losses count real tokens alone."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    x, real = draw(2, 5, 6), np.arange(5) < np.array([[5], [3]])
    params = {"router": draw(6, 4), "gate": draw(4, 6, 3), "up": draw(4, 6, 3), "down": draw(4, 3, 6)}
    layer = MixtureOfExperts(ExpertSettings(4, 2), 3, "silu", gated=True)
    got, aux = table.quick(lambda params, x, real: layer.apply({"params": params}, x, real))(params, x, real)
    logits = np.float64(x) @ params["router"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, -1)[..., :2]
    want = np.zeros(x.shape)
    for b, t in np.ndindex(2, 5):
        for e in chosen[b, t]:
            gate, up = x[b, t] @ params["gate"][e], x[b, t] @ params["up"][e]
            share = p[b, t, e] / p[b, t, chosen[b, t]].sum()
            want[b, t] += share * (gate / (1 + np.exp(-gate)) * up) @ params["down"][e]
    close(got, want, 1e-5)
    shares = np.bincount(chosen[real].ravel(), minlength=4) / (2 * 8)
    close(aux["balance"], (8 * 4 * shares @ p[real].mean(0), 8.0), 1e-5)
    close(aux["router_z"], ((np.log(np.exp(logits[real]).sum(-1)) ** 2).sum(), 8.0), 1e-5)

    # The model's, a sum over its two layers.
    row, sums = ROWS["mixture"], table.quick(lambda params, batch: models.build(row.spec).apply(params, batch).aux)
    one, other = (sums({"params": table.parameters("mixture")}, table.padded(row, junk=junk)) for junk in (0, 5))
    close(one, other, 1e-6)
    assert one["balance"][1] == 2 * sum(table.LENGTHS)


# --- 6 and 7: one program, differently put ----------------------------------------------------------------------------


@column("layouts")
def test_layouts_of_one_program_agree(name):
    """Blockwise attention, unrolled and rematerialised, with all rates 0 in training, against the row as it stands."""
    row, params = ROWS[name], table.parameters(name)
    changes = {"unroll": 2, "remat": "all"}
    if getattr(row.spec, "decoder_layers", None) == 1:
        del changes["unroll"]
    if hasattr(row.spec, "attention"):
        changes["attention"] = "blockwise"
    assert all(getattr(row.spec, key) != value for key, value in changes.items())
    packed = batch(row, [runs(5, 6, length=T), runs(T, length=T)], [runs(4, 4, length=S), runs(6, length=S)])
    want = table.look(name)(params, packed)

    def agree(*items):
        hidden, heads, gradients = table.variant(name, items)(params, packed)
        close((hidden, heads, gradients), (want.hidden, want.heads, want.gradients), 1e-5)

    try:
        agree(*changes.items())
    except AssertionError:
        for item in changes.items():  # which of them it is
            agree(item)
        raise


# --- 8: decoding ------------------------------------------------------------------------------------------------------


@column("decoding")
def test_cached_decoding_equals_teacher_forcing(name):
    """After a prefill of n tokens in the one row and 12 - n in the other, then step by step; the source comes once."""
    row, params = ROWS[name], table.parameters(name)
    one = batch(row, source_segments=[runs(n, length=S) for n in table.SOURCE_LENGTHS])
    source = {key: x for key, x in one.items() if key in ("source_tokens", "source_segments")}
    want = table.look(name)(params, one).hidden
    for n in range(1, T):
        hidden, lengths = table.decoded(name)(params, TOKENS_BT, np.array([n, T - n], np.int32), source)
        close(hidden, want, 2e-5)
        np.testing.assert_array_equal(lengths, T)


@pytest.mark.parametrize("name", ["rnn gru", "gpt3"], indirect=True)
def test_a_later_piece_may_have_its_padding_on_either_side(name):
    """Four tokens after six, with two of padding."""
    model = models.build(ROWS[name].spec)
    feed = table.quick(lambda params, batch, cache: model.apply({"params": params}, batch, cache=cache))
    found, cache = [], model.init_cache(B, T)
    for new, real in ((np.s_[:6], np.s_[:]), (np.s_[6:10], np.s_[:4]), (np.s_[6:10], np.s_[2:])):
        tokens, segments = np.tile(JUNK[:6], (B, 1)), np.zeros((B, 6), np.int32)
        tokens[:, real], segments[:, real] = TOKENS_BT[:, new], 1
        output = feed(table.parameters(name), {"tokens": tokens, "segments": segments}, cache)
        cache = output.cache if not found else cache
        found.append((output.hidden_BTD[:, real], output.cache))
    close(found[2], found[1], 1e-5)


# --- 9: what recurrent layers have of their own -----------------------------------------------------------------------

EQUATIONS = {  # of the input's and the state's shares of the gates, and the state before
    "lstm": lambda x, h, state: lstm(*jnp.split(x + h, 4, -1), state[1]),
    "gru": lambda x, h, state: gru(*jnp.split(x, 3, -1), *jnp.split(h, 3, -1), state[0]),
    "vanilla": lambda x, h, state: (jnp.tanh(x + h),),
}


def lstm(i, f, g, o, c):
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(xr, xz, xn, hr, hz, hn, before):
    update = jax.nn.sigmoid(xz + hz)
    return (update * before + (1 - update) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn),)


@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_the_backward_pass_by_hand_is_that_of_a_plain_loop(cell):
    """With dropout on the state, documents that begin anywhere, and padding anywhere."""
    rng, (length, rows, width) = np.random.default_rng(0), (9, 3, 4)
    gates, states = {"lstm": (4, 2), "gru": (3, 1), "vanilla": (1, 1)}[cell]
    draw = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    x, kernel, bias = draw(length, rows, gates * width), draw(width, gates * width), draw(gates * width)
    state = tuple(draw(rows, width) for _ in range(states))
    drop = np.float32(rng.random((rows, width)) > 0.4) / np.float32(0.6)
    start, real = rng.random((length, rows)) < 0.2, rng.random((length, rows)) < 0.8
    real[:, 2] = False  # a row of padding
    after_bar, last_bar = (tuple(draw(*shape) for _ in state) for shape in ((length, rows, width), (rows, width)))

    def by_hand(x, kernel, bias, state):
        return recurrent.run(cell, x, kernel, bias, drop, start, real, state)

    def plain(x, kernel, bias, state):
        found = []
        for t in range(length):
            before = tuple(jnp.where(start[t][:, None], 0, s) for s in state)
            new = EQUATIONS[cell](x[t], (before[0] * drop) @ kernel + bias, before)
            state = tuple(jnp.where(real[t][:, None], n, s) for n, s in zip(new, before))
            found.append(state)
        return tuple(jnp.stack(each) for each in zip(*found)), state

    def both(run):
        outputs, pull = jax.vjp(run, x, kernel, bias, state)
        return outputs, pull((after_bar, last_bar))

    close(jax.jit(lambda: both(by_hand))(), table.quick(lambda: both(plain))(), 1e-5)


@pytest.mark.parametrize("name", ["rnn lstm", "rnn gru", "rnn vanilla"], indirect=True)
def test_batches_that_carry_the_state_are_one_long_pass(name):
    """Row 0 goes on over the cut inside a document, row 1 begins anew; no gradient passes the cut."""
    params = table.parameters(name)
    quiet = dict.fromkeys(table.rates(ROWS[name].spec), 0.0)
    model = models.build(dataclasses.replace(ROWS[name].spec, carry=True, **quiet))
    tokens = np.concatenate([TOKENS_BT, TOKENS_BT[::-1]], 1)
    whole = {
        "tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones((B, 2 * T), np.float32),
        "segments": np.array([runs(8, 9, 7, length=2 * T), runs(T, T, length=2 * T)]),
        "continues": np.array([0, 0]),
    }  # fmt: skip
    first, second = ({k: x[:, part] if x.ndim > 1 else x for k, x in whole.items()} for part in (np.s_[:T], np.s_[T:]))
    second = second | {"segments": np.array([runs(5, 7, length=T), runs(T, length=T)]), "continues": np.array([1, 0])}
    loss = losses.sums(model, "causal", losses.Settings())
    empty = model.init_cache(B, 0)

    def parts(before, params):
        one, cache = loss(before, first, None, empty)
        two, last = loss(params, second, None, cache)
        return two["loss"][0], (one["loss"][0], cache, last)

    run = table.quick(jax.value_and_grad(parts, (0, 1), has_aux=True))
    (two, (one, cache, last)), (through, inside) = run(params, params)
    long, end = table.quick(lambda: loss(params, whole, None, empty))()
    close(one + two, long["loss"][0], 1e-5)
    close(last, end, 1e-5)
    assert max(np.abs(x).max() for x in cache.layers) > 0.1
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(through))
    assert max(np.abs(x).max() for x in jax.tree.leaves(inside)) > 1e-3


# --- 10: goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_first_losses_are_the_stored_ones(family):
    stored = json.loads(goldens.PATH.read_text(encoding="utf-8"))
    assert set(stored) == set(FAMILIES)
    got = goldens.losses_of(family)
    np.testing.assert_allclose(
        got, stored[family], rtol=1e-4,
        err_msg=f"The first losses of a tiny {family} run have changed: its parameters' names or initial values, its "
        "forward pass, its loss, the optimizer, dropout's bits or the library's random numbers are not what they were. "
        "If that was meant, say so in the commit and run `python -m tests.goldens.families`; if not, it is a bug.",
    )  # fmt: skip
    assert len(got) == goldens.STEPS and np.mean(got[-4:]) < 0.99 * np.mean(got[:4])


def test_losses_cover_the_objectives():
    assert {goldens.RUNS[family].objective for family in FAMILIES} <= set(losses.OBJECTIVES)
