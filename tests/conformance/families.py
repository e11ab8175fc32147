"""The conformance table of the model families: a small spec of every kind, and how it is run.

A column of the table is a test of `test_families.py`; a row says which of them it does not take, and why. Parameters
are drawn here, not by the model: biases and the scales of norms are then no zeros and ones, which would hide them.
Tokens of a batch are pairwise distinct, so that a row of the token table's gradient is the gradient of one embedding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm import models
from llm.models import BertSpec, ClassifierSpec, EncDecSpec, GPTSpec, RNNSpec, T5Spec
from tests.quick import quick

V, B, T, S = 61, 2, 12, 9  # vocabulary, rows, places of a row and of its source

# --- the table --------------------------------------------------------------------------------------------------------

READS_AT_ONCE = "it reads a row at once and writes nothing"
ANY_PLACE = "its places are the order in which it reads"
LEARNED = "its positions are a table, of 24 places"
COLUMNS = ("causality", "padding", "packing", "dropout", "bfloat16", "far positions", "layouts", "decoding")


@dataclasses.dataclass(frozen=True)
class Row:
    """A spec, and what is known of it without running it.

    Attributes:
        spec: small settings; every rate that the family has is set, to values that are told apart.
        sites: dropout masks of each rate that one pass draws, counted by hand; those on attention weights are not seen.
        heads: keys of HEADS that it has.
        causal: a place of the row sees none after it.
        reach: how many places before it a place may hear of through all layers; None is all.
        lacks: columns that it does not take, and why.
    """

    spec: models.ModelSpec
    sites: dict[str, int]
    heads: tuple[str, ...] = ("unembed",)
    causal: bool = True
    reach: int | None = None
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def reads_source(self) -> bool:
        return models.build(self.spec).reads_source


def _rnn(**changes) -> RNNSpec:
    return RNNSpec(vocab_size=V, layers=2, width=16, dropout=0.5, recurrent_dropout=0.3, **changes)


_SMALL = dict(vocab_size=V, layers=2, width=16, heads=4, ff_width=24, dropout=0.5, attention="reference")
_GPT2 = GPTSpec(**_SMALL, context=24, position="learned", norm="layer", norm_epsilon=1e-5, bias=True)
_LLAMA = GPTSpec(**_SMALL, context=2048, activation="silu", gated=True)
_RECURRENT = {"far positions": ANY_PLACE}

_STATES = dict(dropout=3, recurrent_dropout=2)  # the input and the state of both layers, and the output

ROWS: dict[str, Row] = {
    "rnn lstm": Row(_rnn(tied=False), _STATES, lacks=_RECURRENT),
    "rnn gru": Row(_rnn(cell="gru"), _STATES, lacks=_RECURRENT),
    "rnn vanilla": Row(_rnn(cell="vanilla"), _STATES, lacks=_RECURRENT),
    "rnn bidirectional": Row(
        _rnn(bidirectional=True, classes=3, bag=2.0, pooling="max"), dict(dropout=4, recurrent_dropout=4),
        heads=("classify",), causal=False, lacks=_RECURRENT | {"decoding": READS_AT_ONCE},
    ),
    # both embeddings, two parts of an encoder's block and three of a decoder's, and what is pooled
    "classifier": Row(
        ClassifierSpec(**_SMALL, context=24, classes=3), dict(dropout=13), heads=("classify",), causal=False,
        lacks={"decoding": READS_AT_ONCE, "far positions": LEARNED},
    ),
    "encdec post-norm": Row(EncDecSpec(**_SMALL, attention_dropout=0.4), dict(dropout=12, attention_dropout=0)),
    "encdec pre-norm": Row(
        EncDecSpec(
            **_SMALL, attention_dropout=0.4, decoder_layers=1, pre_norm=True, position="learned", context=24,
            norm="rms", activation="silu", bias=False,
        ),
        dict(dropout=9, attention_dropout=0), lacks={"far positions": LEARNED},
    ),
    "bert": Row(
        BertSpec(**_SMALL, attention_dropout=0.4, context=24, classes=3, bag=2.0),
        dict(dropout=6, attention_dropout=0), causal=False,
        heads=("unembed", "next_sentence", "classify", "spans", "sentence"),
        lacks={"decoding": READS_AT_ONCE, "far positions": LEARNED},
    ),
    "gpt2": Row(_GPT2, dict(dropout=5), lacks={"far positions": LEARNED}),
    "gpt3": Row(
        dataclasses.replace(_GPT2, layers=4, windows=(0, 3)), dict(dropout=9), lacks={"far positions": LEARNED}
    ),
    "llama": Row(
        dataclasses.replace(
            _LLAMA, kv_heads=2, tied=False, qk_norm=True, windows=(2,), rope_scaling="yarn", rope_factor=4.0,
            rope_original_context=256,
        ),
        dict(dropout=5), reach=4,
    ),
    "mixture": Row(
        dataclasses.replace(_LLAMA, kv_heads=1, head_width=6, qkv_bias=True, scale_embedding=True, experts=4),
        dict(dropout=5),
    ),
    # the hidden layer of each MLP and what leaves a stack as well
    "t5 1.0": Row(T5Spec(**_SMALL, head_width=6, buckets=8, max_distance=10), dict(dropout=18)),
    "t5 1.1": Row(T5Spec(**_SMALL, activation="gelu_tanh", gated=True, tied=False), dict(dropout=18)),
}  # fmt: skip
# Rows of each column, so that the table cannot silently shrink.
COUNTS = {"causality": 14, "padding": 14, "packing": 14, "dropout": 14, "bfloat16": 14, "far positions": 5,
          "layouts": 14, "decoding": 11}  # fmt: skip


def taking(column: str) -> list[str]:
    """The rows of a column."""
    assert column in COLUMNS, column
    return [name for name, row in ROWS.items() if column not in row.lacks]


# --- batches and parameters -------------------------------------------------------------------------------------------

_IDS = np.random.default_rng(0).permutation(np.arange(1, V)).astype(np.int32)
TOKENS_BT = _IDS[: B * T].reshape(B, T)
SOURCE_BS = _IDS[B * T : B * (T + S)].reshape(B, S)
JUNK = _IDS[B * (T + S) :]  # what stands in padding: ids that no row holds
assert len(JUNK) >= T


def restarted(segments: np.ndarray) -> np.ndarray:
    """Positions that begin anew with each document."""
    positions = np.zeros_like(segments)
    for place in range(1, segments.shape[1]):
        positions[:, place] = np.where(segments[:, place] == segments[:, place - 1], positions[:, place - 1] + 1, 0)
    return positions


def batch(
    row: Row,
    segments: Any = None,
    source_segments: Any = None,
    tokens: np.ndarray = TOKENS_BT,
    source: np.ndarray = SOURCE_BS,
) -> dict[str, np.ndarray]:
    """A batch of a row's family; each row is one document unless segments say something else."""
    segments = np.ones(tokens.shape, np.int32) if segments is None else np.asarray(segments, np.int32)
    made = {"tokens": tokens, "segments": segments, "positions": restarted(segments)}
    if isinstance(row.spec, BertSpec):
        made["types"] = (made["positions"] % 3 == 1) & (segments != 0)
    if row.reads_source:
        more = np.ones(source.shape, np.int32) if source_segments is None else np.asarray(source_segments, np.int32)
        made |= {"source_tokens": source, "source_segments": more, "source_positions": restarted(more)}
    return {key: value.astype(np.int32) for key, value in made.items()}


def runs(*lengths: int, length: int) -> list[int]:
    """Segments of one row: documents of these lengths, then padding."""
    ids = [number for number, n in enumerate(lengths, 1) for _ in range(n)]
    return ids + [0] * (length - len(ids))


LENGTHS, SOURCE_LENGTHS = (7, 10), (5, 8)  # of the rows where they have padding


def padded(row, lengths=LENGTHS, source_lengths=SOURCE_LENGTHS, junk=0):
    """Rows of these lengths with ids in their padding that stand nowhere else."""
    segments = [runs(n, length=T) for n in lengths]
    source_segments = [runs(n, length=S) for n in source_lengths]
    tokens = np.where(segments, TOKENS_BT, np.resize(np.roll(JUNK, junk), (B, T)))
    source = np.where(source_segments, SOURCE_BS, np.resize(np.roll(JUNK, -junk), (B, S)))
    return batch(row, segments, source_segments, tokens, source)


HEADS: dict[str, Callable] = {
    "unembed": lambda m, hidden, batch, train: m.unembed(hidden),
    "next_sentence": lambda m, hidden, batch, train: m.next_sentence(hidden, batch),
    "classify": lambda m, hidden, batch, train: m.classify(hidden, batch, train),
    "spans": lambda m, hidden, batch, train: jnp.stack(m.spans(hidden), -1),
    "sentence": lambda m, hidden, batch, train: m.sentence(hidden, batch),
}
OF_PLACES = ("unembed", "spans")  # the others are of rows


def everything(row: Row) -> Callable:
    """f(module, batch, train) -> (hidden_BTD, outputs of the heads): what touches all parameters."""

    def run(module, batch, train=False):
        hidden = module(batch, train=train).hidden_BTD
        return hidden, {name: HEADS[name](module, hidden, batch, train) for name in row.heads}

    return run


@functools.lru_cache
def shapes(name: str) -> Any:
    """The shapes and dtypes of a row's parameters when it computes in bfloat16."""
    row = ROWS[name]
    model = models.build(dataclasses.replace(row.spec, dtype="bfloat16"))
    small = {key: x[:1, :1] for key, x in batch(row).items()}
    return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), small, method=everything(row))))["params"]


@functools.lru_cache
def parameters(name: str) -> Any:
    """Parameters by numpy: kernels and tables of deviation 1/4, biases 1/8, scales 1 +- 1/8."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        leaf = path[-1].key
        deviation = 0.125 if leaf == "scale" or leaf.endswith("bias") else 0.25
        return np.float32((leaf == "scale") + deviation * rng.normal(size=x.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes(name))


# --- running ----------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What is seen of a run without dropout.

    Attributes:
        hidden: (B, T, D), zeros at padding.
        heads: by name; zeros at padding for those of places.
        influence_TV: for each place, how much its hidden states, of all rows, depend on the embedding of each id.
        gradients: of the parameters, of a fixed linear function of hidden states and heads.
    """

    hidden: jax.Array
    heads: dict[str, jax.Array]
    influence_TV: jax.Array
    gradients: Any


def _outputs(row: Row, spec, params, batch, train=False):
    """(hidden, heads), both zero at padding."""
    hidden, heads = models.build(spec).apply({"params": params}, batch, train, method=everything(row))
    real = (batch["segments"] != 0)[..., None]
    return (
        jnp.where(real, hidden, 0),
        {name: jnp.where(real, x, 0) if name in OF_PLACES else x for name, x in heads.items()},
    )


def _weights(row: Row, outputs):
    """The coefficients of the linear function: random, so that no norm's gradient vanishes."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), outputs)


@functools.lru_cache
def look(name: str) -> Callable[[Any, dict], Look]:
    """f(params, batch) of a row as it stands in the table."""
    row = ROWS[name]

    def run(params, batch) -> Look:
        outputs, pull = jax.vjp(lambda params: _outputs(row, row.spec, params, batch), params)
        hidden_bar, heads_bar = _weights(row, outputs)
        # One pull for each place of the row, and one for the heads.
        each = np.eye(T + 1, T, dtype=np.float32)[:, None, :, None] * hidden_bar
        last = np.arange(T + 1) == T
        heads = jax.tree.map(lambda x: last.reshape(-1, *[1] * x.ndim).astype(np.float32) * x, heads_bar)
        (gradients,) = jax.lax.map(pull, (each, heads))  # not vmap, which ragged products lack
        influence = jnp.abs(gradients["embed"]["table"][:T]).max(-1)
        return Look(*outputs, influence, jax.tree.map(lambda x: x.sum(0), gradients))

    return quick(run)


@functools.lru_cache
def variant(name: str, changes: tuple[tuple[str, Any], ...]) -> Callable[[Any, dict], tuple]:
    """f(params, batch) -> (hidden, heads, gradients) as of `look`, by a spec with changes.

    It trains with all rates at 0 and without a key, which is no dropout either.
    """
    row = ROWS[name]
    spec = dataclasses.replace(row.spec, **dict(changes), **dict.fromkeys(rates(row.spec), 0.0))

    def run(params, batch):
        outputs, pull = jax.vjp(lambda params: _outputs(row, spec, params, batch, train=True), params)
        return *outputs, pull(_weights(row, outputs))[0]

    return quick(run)


@functools.lru_cache
def bare(name: str) -> Callable[[Any, dict], tuple]:
    """f(params, batch) -> (hidden, heads) of a batch that may lack segments and positions."""
    row = ROWS[name]
    return quick(lambda params, batch: models.build(row.spec).apply({"params": params}, batch, method=everything(row)))


@functools.lru_cache
def half(name: str) -> Callable[[Any, dict], tuple]:
    """As `bare`, in bfloat16."""
    row = ROWS[name]
    model = models.build(dataclasses.replace(row.spec, dtype="bfloat16"))
    return quick(lambda params, batch: model.apply({"params": params}, batch, method=everything(row)))


def rates(spec) -> dict[str, float]:
    """The dropout rates of a spec by field."""
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if "dropout" in field.name}


@functools.lru_cache
def dropped(name: str) -> Callable[..., tuple]:
    """f(params, batch, keys, gates) -> (hidden, heads, masks) in training, each with a leading axis over the keys.

    `gates` (keys, rates) says which of the spec's rates act, those on attention weights aside, which always do. Masks
    are recorded by module, as they would act: 0 or 1 / (1 - rate).
    """
    row = ROWS[name]
    model, declared = models.build(row.spec), list(rates(row.spec).values())

    def one(params, batch, key, gates):
        def interceptor(call, args, kwargs, context):
            module, (x, *rest) = context.module, args or (None,)
            if not isinstance(module, nn.Dropout) or module.deterministic or module.rate == 0:
                return call(*args, **kwargs)
            mask = call(jnp.ones_like(x), *rest, **kwargs)
            module.sow("intermediates", "masks", mask)
            return jnp.where(gates[declared.index(module.rate)], x * mask, x)

        with nn.intercept_methods(interceptor):
            outputs, seen = model.apply(
                {"params": params}, batch, True, method=everything(row), rngs={"dropout": key},
                mutable=["intermediates"],
            )  # fmt: skip
        return *outputs, seen["intermediates"]

    return quick(
        lambda params, batch, keys, gates: jax.lax.map(lambda drawn: one(params, batch, *drawn), (keys, gates))
    )


@functools.lru_cache
def decoded(name: str) -> Callable[..., tuple]:
    """f(params, tokens, lengths, source) -> (hidden, cache lengths): a prefill, then single steps to the row's end.

    The prefill reads `lengths` tokens of each row, with other tokens in its padding, which is after those of the first
    row and before those of the second; rows that have reached their end are fed padding.
    """
    row = ROWS[name]
    how = {} if isinstance(row.spec, RNNSpec) else {"attention": "blockwise"}
    model = models.build(dataclasses.replace(row.spec, **how))

    def run(params, tokens_BT, lengths_B, source):
        feed = lambda batch, cache: model.apply({"params": params}, batch, cache=cache)  # noqa: E731
        starts_B1 = jnp.array([[0], [T - lengths_B[1]]])
        places_BT = jnp.arange(T) - starts_B1
        given = (places_BT >= 0) & (places_BT < lengths_B[:, None])
        read_BT = jnp.take_along_axis(tokens_BT, places_BT % T, axis=1)
        first = {"tokens": jnp.where(given, read_BT, JUNK[:T]), "segments": given.astype(jnp.int32)}
        output = feed(first | source, model.init_cache(B, T, S if source else 0))
        rows = jnp.arange(B)

        def step(cache, _):
            places_B = cache.lengths_B
            real_B = places_B < T
            token_B = jnp.where(real_B, tokens_BT[rows, places_B], JUNK[0])
            output = feed({"tokens": token_B[:, None], "segments": real_B.astype(jnp.int32)[:, None]}, cache)
            return output.cache, (places_B, output.hidden_BTD[:, 0])

        cache, (places_TB, hidden_TBD) = jax.lax.scan(step, output.cache, None, length=T - 1)
        read_BTD = jnp.take_along_axis(output.hidden_BTD, ((jnp.arange(T) + starts_B1) % T)[..., None], axis=1)
        stepped = read_BTD.at[rows, places_TB].set(hidden_TBD, mode="drop")
        return stepped, cache.lengths_B

    return quick(run)


def on_the_left(batch: dict) -> dict[str, np.ndarray]:
    """The same rows and sources with their padding before them, and nothing that says which place is which."""
    moved = {}
    for key, x in batch.items():
        segments = batch["source_segments" if key.startswith("source") else "segments"]
        if not key.endswith("positions"):
            moved[key] = np.stack([np.roll(row, (real == 0).sum()) for row, real in zip(x, segments)])
    return moved


# --- comparing --------------------------------------------------------------------------------------------------------


def close(got, want, tolerance: float):
    """Trees of arrays, within a tolerance of the largest entry."""
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want):
        limit = tolerance * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def same(got, want):
    """Trees of arrays, equal to the bit."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def finite(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


def seen(row) -> np.ndarray:
    """(T, T) bool: whether a place hears of another one of its document."""
    t, s = np.arange(T)[:, None], np.arange(T)
    if not row.causal:
        return np.ones((T, T), bool)
    return (s <= t) & (s >= t - (T if row.reach is None else row.reach))


def masks_of(seen: dict) -> dict[str, np.ndarray]:
    """Each mask by name, (keys, B, ...): those of scanned layers taken apart, of an RNN's times the first."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(seen):
        where = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        where = f"{'/'.join(where)} {path[-1].idx}"
        for layer, mask in enumerate(np.moveaxis(x, 1, 0)) if "layers" in where else [("", np.asarray(x))]:
            found[f"{where} {layer}"] = mask
    return found


def unlike(a: np.ndarray, b: np.ndarray) -> bool:
    """Masks of rates of 0.3 and 0.5 that were drawn apart differ in 4 of 10 entries and more."""
    return (a != b).mean() > 0.3
