"""The worked program, a Transformer text classifier: what each fault of its printed form does, beside the right form.

The right form is the library's, preset "worked-program". It is also written out here in `jax.numpy`, once, equal to
the library's to rounding; a fault is one argument or one line that departs from it, so that what is seen is the fault's
doing and nothing else's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.classifier import seed
from llm import models
from llm.attention import Mask, attention_weights
from llm.models import ClassifierSpec
from llm.nn.block import Block, Surroundings
from llm.nn.embed import Embed
from llm.nn.multi_head_attention import AttentionSettings, MultiHeadAttention
from llm.nn.pool import pool
from llm.nn.stack import Stack
from llm.training import optimizer
from llm.training.losses import cross_entropy
from llm.training.spec import OptimizerSpec
from llm.training.state import TrainState
from llm.training.step import train_step

WIDTH, HEADS, HEAD_WIDTH, RATE, CLASSES = 512, 8, 64, 0.1, 10  # the program's
SMALL = ClassifierSpec(
    vocab_size=50, context=12, classes=CLASSES, layers=1, width=32, heads=4, ff_width=48, dropout=0.0
)
# Two layers to a side are one layer twice: one compiles faster, where the number does not matter.
ATTENTION = AttentionSettings(heads=HEADS, kv_heads=HEADS, head_width=HEAD_WIDTH, bias=True, output_bias=True)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fill(shapes):
    """Random parameters of these shapes, biases and scales too; to compile an init would take longer than all tests."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        kind, owner, shape = path[-1].key, path[-2].key if len(path) > 1 else "", leaf.shape
        x = rng.normal(size=shape)
        if kind == "kernel":
            heads = slice(-3, -2) if owner in ("query", "key", "value") else slice(-3, -1)  # (D, N, H) and (N, H, D)
            x *= np.prod(shape[slice(-2, -1) if owner in ("up", "down") else heads]) ** -0.5
        elif kind == "table":
            x *= shape[-1] ** -0.5
        else:
            x = (kind == "scale") + 0.1 * x
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(shapes)["params"])


def parameters(module, *args, method=None):
    return fill(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, method=method)))


def classifier(spec):
    model, batch = models.build(spec), {"tokens": jnp.zeros((1, 1), jnp.int32)}
    return model, parameters(model, method=lambda m: m.classify(m(batch).hidden_BTD, batch))


def texts(spec, rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, spec.vocab_size, (rows, spec.context)), jnp.int32)


def library(model):
    """f(params, tokens) -> (hidden_BTD, logits_BC) of the library's model."""

    def run(params, tokens):
        batch = {"tokens": tokens}
        hidden = model.apply({"params": params}, batch).hidden_BTD
        return hidden, model.apply({"params": params}, hidden, batch, method="classify")

    return run


# --- the program written out ------------------------------------------------------------------------------------------


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def attend(p, x, source, transposed=True, divisor=None):
    """Returns (y_BTD, the attention matrix). Faults: heads not `transposed`; scores over another `divisor`."""
    q, k, v = (
        jnp.einsum("BTD,DNH->BTNH", read, p[name]["kernel"]) + p[name]["bias"]
        for name, read in (("query", x), ("key", source), ("value", source))
    )
    if transposed:
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / (divisor or q.shape[-1] ** 0.5), axis=-1)
    y = weights @ v
    if transposed:
        y = y.swapaxes(1, 2)
    return jnp.einsum("BTNH,NHD->BTD", y, p["output"]["kernel"]) + p["output"]["bias"], weights


def block(p, x, source=None, doubled=False):
    """An encoder's or a decoder's layer. Fault: the residual `doubled`, x + x."""

    def add(name, x, y):
        return layer_norm(p[name], x + x if doubled else x + y)

    x = add("attention_norm", x, attend(p["attention"], x, x)[0])
    if "cross_attention" in p:
        x = add("cross_attention_norm", x, attend(p["cross_attention"], x, x if source is None else source)[0])
    return add("mlp_norm", x, linear(p["mlp"]["down"], jax.nn.relu(linear(p["mlp"]["up"], x))))


def program(params, tokens, source_given=True, positions=lambda x: jnp.arange(x.shape[1])):
    """Returns (hidden_BTD, logits_BC) without dropout. Faults: the decoder not given its source; other `positions`."""

    def embed():
        x = params["embed"]["table"][tokens] * params["embed"]["table"].shape[1] ** 0.5
        return x + params["embed_position"]["table"][positions(x)]

    def stack(side, x, source=None):
        layers = params[side]["layers"]
        for i in range(layers["mlp_norm"]["scale"].shape[0]):
            x = block(jax.tree.map(lambda a, i=i: a[i], layers), x, source)
        return x

    source = stack("encoder", embed())
    hidden = stack("decoder", embed(), source if source_given else None)
    return hidden, linear(params["class_head"]["output"], hidden.mean(1))


def test_the_right_form_written_out_is_the_librarys():
    spec = models.PRESETS["classifier"]["worked-program"]
    assert (spec.width, spec.heads, spec.width // spec.heads) == (WIDTH, HEADS, HEAD_WIDTH)
    assert (spec.dropout, spec.classes) == (RATE, CLASSES)
    assert (spec.layers, spec.ff_width, spec.vocab_size, spec.context) == (2, 2048, 1000, 100)
    model, params = classifier(spec)
    tokens = texts(spec, 2)
    hidden, logits = jax.jit(library(model))(params, tokens)
    assert hidden.shape == (2, 100, WIDTH) and logits.shape == (2, CLASSES)
    for right, mine in zip((hidden, logits), jax.jit(program)(params, tokens)):
        np.testing.assert_allclose(mine, right, atol=2e-4)


@pytest.fixture(scope="module")
def small():
    """The library's model at a small size, parameters, four texts, and f(params, tokens) of it, compiled once."""
    model, params = classifier(SMALL)
    return model, params, texts(SMALL, 4), jax.jit(library(model))


# --- its faults -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer():
    """The library's attention layer at the program's sizes, its parameters, and an input of five tokens."""
    module, x = MultiHeadAttention(ATTENTION, train=False), normal(2, 5, WIDTH)
    return jax.jit(lambda p, x: module.apply({"params": p}, x, Mask())[0]), parameters(module, x, Mask()), x


def moved(f, params, x):
    """How far each token's output moves when token 3 of the input changes."""
    other = x.at[:, 3].set(-x[:, 3])
    return np.abs(f(params, other) - f(params, x)).max((0, 2))


def test_heads_never_transposed_mix_heads_and_not_tokens(layer):
    right, params, x = layer
    faulty = jax.jit(lambda p, x: attend(p, x, x, transposed=False))
    np.testing.assert_allclose(jax.jit(attend)(params, x, x)[0], right(params, x), atol=1e-5)

    elsewhere = [0, 1, 2, 4]
    assert moved(right, params, x)[elsewhere].min() > 1e-2
    alone = moved(lambda p, x: faulty(p, x)[0], params, x)
    np.testing.assert_array_equal(alone[elsewhere], 0)
    assert alone[3] > 1e-2

    # Its matrix is heads by heads, one for each token; the right one is tokens by tokens, one for each head.
    assert faulty(params, x)[1].shape == (2, 5, HEADS, HEADS)
    q, k = normal(2, 5, HEADS, HEAD_WIDTH), normal(2, 5, HEADS, HEAD_WIDTH)
    assert attention_weights(q, k).shape == (2, HEADS, 5, 5)
    assert faulty(params, x)[0].shape == right(params, x).shape  # so that nothing complains


def test_a_scale_from_the_whole_width_flattens_the_weights(layer):
    right, params, x = layer
    faulty = jax.jit(lambda p, x: attend(p, x, x, divisor=WIDTH**0.5))
    assert np.abs(faulty(params, x)[0] - right(params, x)).max() > 1e-2

    q, k = normal(1, 16, HEADS, HEAD_WIDTH, seed=1), normal(1, 16, HEADS, HEAD_WIDTH, seed=2)
    exact = np.einsum("BTNH,BSNH->BNTS", np.float64(q), np.float64(k))
    sharp = np.float64(jax.jit(attention_weights)(q, k))
    flat = np.float64(jax.nn.softmax(jnp.asarray(exact, jnp.float32) / WIDTH**0.5, axis=-1))

    def scores(weights):  # up to what the softmax takes out of each row
        return np.log(weights) - np.log(weights).mean(-1, keepdims=True)

    def entropy(weights):
        return -(weights * np.log(weights)).sum(-1)

    centred = exact - exact.mean(-1, keepdims=True)
    np.testing.assert_allclose(scores(sharp), centred / HEAD_WIDTH**0.5, atol=1e-5)
    np.testing.assert_allclose(scores(sharp), scores(flat) * 8**0.5, atol=1e-5)
    assert (entropy(flat) > entropy(sharp)).all()
    assert entropy(flat).mean() > np.log(16) - 0.1 and entropy(sharp).mean() < np.log(16) - 0.3


def test_dropout_on_the_logits_cuts_out_the_right_class():
    model = models.build(dataclasses.replace(SMALL, dropout=RATE))
    draws, right_class, rng = 4000, 4, np.random.default_rng(0)
    pooled, kernel = rng.normal(size=SMALL.width), 0.03 * rng.normal(size=(SMALL.width, CLASSES))
    kernel[:, right_class] += 10 * pooled / (pooled @ pooled)  # certain of its class
    params = {"class_head": {"output": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(CLASSES)}}}
    # One text many times over, each with dropout of its own.
    hidden = jnp.broadcast_to(jnp.asarray(pooled, jnp.float32), (draws, 1, SMALL.width))
    batch, labels = {"tokens": jnp.zeros((draws, 1), jnp.int32)}, jnp.full(draws, right_class)

    @jax.jit
    def run(key, hidden, labels):
        def classify(train):
            how = {"train": train, "rngs": {"dropout": key}, "method": "classify"}
            return model.apply({"params": params}, hidden, batch, **how)

        without = classify(train=False)
        kept = jax.random.bernoulli(key, 1 - RATE, without.shape)
        forms = without, classify(train=True), jnp.where(kept, without / (1 - RATE), 0.0)
        return [((z == 0).mean(), (z.argmax(-1) != labels).mean(), cross_entropy(z, labels).mean()) for z in forms]

    without, right, faulty = np.array(run(jax.random.key(0), hidden, labels))
    for zeros, wrong, loss in (without, right):
        assert zeros == 0 and wrong == 0 and loss < 1e-2
    zeros, wrong, loss = faulty
    deviation = (RATE * (1 - RATE) / draws) ** 0.5
    assert abs(zeros - RATE) < 4 * deviation and abs(wrong - RATE) < 4 * deviation
    # The loss of a text whose class was cut out is about ln 10, whatever the model knows.
    np.testing.assert_allclose(loss, RATE * np.log(CLASSES), rtol=0.3)


def test_x_plus_x_leaves_all_of_the_layer_out():
    module, x = Block(models.build(SMALL).spec.wiring().block, train=False), normal(2, 5, SMALL.width)
    params = parameters(module, x, Surroundings(Mask()))
    right = jax.jit(lambda p, x: module.apply({"params": p}, x, Surroundings(Mask()))[0])
    faulty = jax.jit(lambda p, x: block(p, x, doubled=True))
    np.testing.assert_allclose(jax.jit(block)(params, x), right(params, x), atol=1e-5)

    without = params | {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("attention", "mlp")}
    assert np.abs(right(without, x) - right(params, x)).max() > 0.1
    np.testing.assert_array_equal(faulty(without, x), faulty(params, x))
    # What is left is norms of norms, each token by itself.
    assert moved(right, params, x)[:3].min() > 1e-3
    np.testing.assert_array_equal(moved(faulty, params, x)[:3], 0)
    norms = ("attention_norm", "mlp_norm")
    plain = params | dict.fromkeys(norms, {"scale": jnp.ones(SMALL.width), "bias": jnp.zeros(SMALL.width)})
    np.testing.assert_allclose(faulty(plain, x), layer_norm(plain["mlp_norm"], x), atol=1e-5)


def test_a_list_of_layers_is_no_layer():
    settings, x, around = SMALL.wiring().block, normal(2, 5, SMALL.width), Surroundings(Mask())
    stack = Stack(settings, layers=2, train=False)
    params = parameters(stack, x, around)
    each = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(2)]
    layers = [lambda x, p=p: block(p, x) for p in each]

    with pytest.raises(TypeError, match="'list' object is not callable"):
        layers(x)  # pyright: ignore[reportCallIssue]
    through = jax.jit(lambda params, x: stack.apply({"params": params}, x, around)[0])(params, x)
    np.testing.assert_allclose(through, layers[1](layers[0](x)), atol=1e-5)
    assert np.abs(through - layers[0](layers[1](x))).max() > 0.1  # in their order


def test_a_decoder_without_the_encoders_output_teaches_the_encoder_nothing(small):
    model, params, tokens, _ = small

    def largest(f):
        """The largest derivative of the first class's logits, of the parameters of each side."""
        sides = {name: params[name] for name in ("encoder", "decoder")}
        gradient = jax.jit(jax.grad(lambda sides, tokens: f(params | sides, tokens)[1][:, 0].sum()))(sides, tokens)
        return [max(np.abs(g).max() for g in jax.tree.leaves(gradient[side])) for side in sides]

    encoder, decoder = largest(library(model))
    assert encoder > 1e-2 and decoder > 1e-2
    encoder, decoder = largest(lambda params, tokens: program(params, tokens, source_given=False))
    assert encoder == 0 and decoder > 1e-2


def test_without_pooling_there_are_as_many_predictions_as_tokens(small):
    model, params, _, _ = small
    hidden, labels = normal(4, 6, SMALL.width), jnp.arange(4)
    batch = {"tokens": jnp.zeros((4, 6), jnp.int32)}
    right = jax.jit(lambda h: model.apply({"params": params}, h, batch, method="classify"))(hidden)
    assert right.shape == (4, CLASSES) and cross_entropy(right, labels).shape == (4,)
    faulty = linear(params["class_head"]["output"], hidden)
    assert faulty.shape == (4, 6, CLASSES)
    with pytest.raises(ValueError, match="same number of dimensions"):
        cross_entropy(faulty, labels)

    # A loss from one-hot labels broadcasts instead. With as many rows as tokens nothing complains, and each token is
    # held against the label of another row: a model that is right everywhere gets the loss of one that is wrong.
    def broadcast(logits_BTC):
        return -(jax.nn.one_hot(labels, CLASSES) * jax.nn.log_softmax(logits_BTC)).sum(-1).mean()

    with pytest.raises(ValueError, match="Incompatible shapes"):
        broadcast(faulty)
    certain_BTC = jnp.broadcast_to(20 * jax.nn.one_hot(labels, CLASSES)[:, None], (4, 4, CLASSES))
    pooled_BC = pool(certain_BTC, jnp.ones((4, 4), bool), "mean")
    assert cross_entropy(pooled_BC, labels).max() < 1e-6
    np.testing.assert_allclose(broadcast(certain_BTC), 20 * 3 / 4, rtol=1e-5)


def test_positions_of_activations_are_all_alike(small):
    _, params, tokens, right = small
    table = Embed(SMALL.context, SMALL.width)
    place = {"params": {"table": params["embed_position"]["table"]}}
    with pytest.raises(TypeError, match="integer"):
        table.apply(place, normal(2, 12, SMALL.width))
    assert table.apply(place, jnp.arange(12)[None]).shape == (1, 12, SMALL.width)  # pyright: ignore

    def rounded(x):  # the nearest thing that runs
        return jnp.round(x.mean(-1)).astype(jnp.int32)

    embedded = params["embed"]["table"][tokens] * SMALL.width**0.5
    np.testing.assert_array_equal(rounded(embedded), 0)

    faulty = jax.jit(lambda p, t: program(p, t, positions=rounded))
    order = np.random.default_rng(1).permutation(SMALL.context)
    for f, blind in ((right, False), (faulty, True)):
        hidden, logits = f(params, tokens)
        hidden_of_permuted, logits_of_permuted = f(params, tokens[:, order])
        apart = np.abs(hidden[:, order] - hidden_of_permuted).max(), np.abs(logits - logits_of_permuted).max()
        assert max(apart) < 1e-5 if blind else min(apart) > 1e-2, (blind, apart)


def test_without_an_optimizer_the_loss_stands_still():
    # The head alone, on pooled vectors: nothing else of the model has a part in it.
    start = {"class_head": {"output": {"kernel": normal(SMALL.width, CLASSES), "bias": jnp.zeros(CLASSES)}}}
    x, labels = normal(8, SMALL.width, seed=1), jnp.arange(8)
    spec = OptimizerSpec(1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0)
    adam, zero = optimizer.build(spec, 100), jnp.zeros((), jnp.int32)

    def nats(params, batch, key=None):
        nats_B = cross_entropy(linear(params["class_head"]["output"], batch["x"]), batch["labels"])
        return {"loss": (nats_B.sum(), jnp.float32(len(labels)))}

    @jax.jit
    def right(state, batch):
        how = {"schedule": optimizer.schedule(spec, 100), "clip_norm": 1.0}
        return train_step(state, batch, loss=nats, optimizer=adam, **how)

    @jax.jit
    def faulty(params, batch):
        return jax.value_and_grad(lambda p: nats(p, batch)["loss"][0] / 8)(params)

    state = TrainState(zero, zero, zero, start, adam.init(start), jax.random.key(0))
    batch, learned, stood = {"x": x, "labels": labels}, [], []
    for _ in range(5):
        state, metrics = right(state, batch)
        learned.append(float(metrics["loss"]))
        loss, gradient = faulty(start, batch)
        stood.append(float(loss))
    np.testing.assert_allclose(learned[0], stood[0], rtol=1e-5)
    assert all(later < before for before, later in zip(learned, learned[1:])), learned
    assert np.abs(gradient["class_head"]["output"]["kernel"]).max() > 1e-2  # there was something to follow
    assert len(set(stood)) == 1, stood


def test_a_pair_of_arrays_is_no_row_of_batches():
    data = seed.examples(models.PRESETS["classifier"]["worked-program"], 32, np.random.default_rng(0))
    x, y = data["tokens"], data["labels"]
    right = seed.batches(data, 8, np.random.default_rng(0))
    assert [(b["tokens"].shape, b["labels"].shape) for b in right] == [((8, 100), (8,))] * 4
    rows = np.concatenate([np.column_stack([b["labels"], b["tokens"]]) for b in right])
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(np.column_stack([y, x]), axis=0))
    assert len(np.unique(rows, axis=0)) == 32  # each once, with its own label

    assert [batch.shape for batch in (x, y)] == [(32, 100), (32,)]  # all inputs, then all labels
    with pytest.raises(ValueError, match="too many values to unpack"):
        for inputs, labels in (x, y):
            del inputs, labels


def test_logits_are_no_probabilities(small):
    model, params, tokens, run = small
    kernel = 3 * params["class_head"]["output"]["kernel"]  # surer of itself than random parameters make it
    params = params | {"class_head": {"output": params["class_head"]["output"] | {"kernel": kernel}}}
    right = np.asarray(seed.probabilities(model, params, tokens))
    faulty = np.asarray(run(params, tokens)[1])
    np.testing.assert_allclose(right.sum(-1), 1, atol=1e-6)
    assert right.min() >= 0 and (right > 0.5).sum(-1).max() <= 1
    np.testing.assert_array_equal(right.argmax(-1), faulty.argmax(-1))  # so that accuracy does not show it
    assert np.abs(faulty.sum(-1) - 1).min() > 0.05 and faulty.min() < 0
    assert (faulty > 0.5).sum(-1).max() >= 2  # several classes "more likely than not" at once
    assert ((faulty > 0.5) != (right > 0.5)).any(-1).all()
