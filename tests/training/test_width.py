"""The learning rate carried from width to width (muP): what the model and the optimizer scale, and what that holds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm import models
from llm.config import default_config, resolve
from llm.errors import InputError
from llm.models.gpt import GPTSpec
from llm.training import losses, optimizer, roles
from llm.training.spec import OptimizerSpec
from tests.quick import quick

VOCAB, LENGTH, BASE, WIDE = 24, 12, 16, 128


def spec(width: int, base: int | None, **fields) -> GPTSpec:
    return GPTSpec(VOCAB, LENGTH, layers=2, width=width, width_base=base, scale_embedding=True, **fields)


@functools.cache
def sizes(one: GPTSpec, steps: int = 4) -> dict[str, float]:
    """How far some Adam steps move what each part of the model gives: the root mean square of the change, by part."""
    model, rate = models.build(one), OptimizerSpec(2.0**-6, warmup_steps=0, schedule="constant", weight_decay=0.0)
    opt = optimizer.build(rate, steps, models.width_share(one))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, LENGTH + 1))
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    batch |= {"weights": jnp.ones(batch["tokens"].shape), "segments": jnp.ones_like(batch["tokens"])}
    loss = losses.next_token(model, None)
    everything = lambda m: m.unembed(m({"tokens": batch["tokens"]}).hidden_BTD)  # noqa: E731

    @quick
    def run():
        params = start = nn.unbox(model.init(jax.random.key(1), method=everything))["params"]
        state = opt.init(params)
        for _ in range(steps):
            gradients = jax.grad(lambda p: loss(p, batch)["loss"][0] / batch["weights"].sum())(params)
            updates, state = opt.update(gradients, state, params)
            params = optax.apply_updates(params, updates)

        def seen(params):
            logits, kept = model.apply(
                {"params": params}, method=everything, capture_intermediates=True, mutable="intermediates"
            )
            layers = kept["intermediates"]["stack"]["layers"]
            parts = {name: layers[name]["__call__"][0] for name in ("attention", "mlp")}
            parts["attention"] = parts["attention"][0]
            return parts | {"logits": logits}

        return jax.tree.map(lambda a, b: jnp.sqrt(jnp.square(a - b).mean()), seen(params), seen(start))

    return {name: float(x) for name, x in run().items()}


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_a_wider_model_moves_as_far_with_the_same_rate(tied):
    """The coordinate check of Yang et al. 2022 (appendix D.1): changes of activations hold their size."""
    base, wide = (sizes(spec(width, BASE, tied=tied)) for width in (BASE, WIDE))
    for part in base:
        assert 0.4 < wide[part] / base[part] < 1.6, (part, base, wide)


@pytest.mark.long
def test_without_it_a_wider_model_moves_further():
    base, wide = (sizes(spec(width, None)) for width in (BASE, WIDE))
    for part in base:
        assert wide[part] / base[part] > 2.5, (part, base, wide)


@pytest.mark.long
def test_at_its_base_it_is_the_standard_parametrisation():
    for fields in ({}, {"tied": False, "head_width": 8}):
        one, other = spec(BASE, BASE, **fields), spec(BASE, None, **fields)
        assert sizes(one, 2) == sizes(other, 2)


def test_what_is_scaled_and_by_how_much():
    """Table 8 of Yang et al. 2022 by hand, for a model four times as wide as its base."""
    one = spec(4 * BASE, BASE, tied=False, experts=2)
    model = models.build(one)
    everything = lambda m: m.unembed(m({"tokens": jnp.zeros((1, 1), jnp.int32)}).hidden_BTD)  # noqa: E731
    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), method=everything))["params"])
    rates = OptimizerSpec(rates=("expert=3",))
    factors = optimizer.rate_factors(rates, shapes, models.width_share(one))
    found = {roles.role(roles.path_name(path)).name: set(np.unique(x).tolist())
             for path, x in jax.tree_util.tree_leaves_with_path(factors)}  # fmt: skip
    assert found == {"embedding": {1.0}, "norm": {1.0}, "unembedding": {1.0}, "attention": {0.25}, "router": {0.25},
                     "expert": {0.75}}  # fmt: skip
    # Scores: 1/H times the root of the base's head width, and as at the base where heads keep their width.
    assert one.attention_settings().score_scale * 16**-0.5 == pytest.approx(4**0.5 / 16)
    assert spec(4 * BASE, BASE, head_width=4).attention_settings().score_scale == 1.0
    # The unembedding starts as wide as at the base, and its products are divided by the ratio of widths.
    big = spec(64 * BASE, BASE, tied=False)
    ones = {"unembedding_projection": {"kernel": jnp.ones((64 * BASE, VOCAB))}}
    logits = models.build(big).apply({"params": ones}, jnp.ones((1, 1, 64 * BASE)), method="unembed")
    np.testing.assert_allclose(logits, BASE)


def test_other_rules_are_refused():
    config = default_config("gpt")
    config.model.width_base = 64
    resolve(config)
    for name in ("muon", "adafactor"):
        config.optimizer.name = name
        with pytest.raises(InputError, match=f"optimizer.name='{name}': model.width_base carries adamw and lion alone"):
            resolve(config)
