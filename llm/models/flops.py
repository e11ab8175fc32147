"""Floating-point operations of a forward pass, counted from the parameters (Chowdhery et al. 2022, appendix B)."""

from collections.abc import Mapping, Sequence

import jax

from llm.models.contract import Model


def products(params, looked_up: Sequence[str], share: Mapping[str, float] = {}) -> float:
    """2 a parameter that a token is multiplied with.

    Args:
        params: the tree.
        looked_up: top-level names of tables that are looked up and not multiplied with.
        share: the share of the parameters below a name that one token meets, that of the chosen experts.
    """
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[0] not in looked_up:
            factors = [share[name] for name in names if name in share]
            total += 2.0 * x.size * (factors[0] if factors else 1.0)
    return total


def attention(layers: int, heads: int, head_width: int, length: int) -> float:
    """Attention's two products, counted whole whatever is masked: 4 N H S a layer and token."""
    return 4.0 * layers * heads * head_width * length


def repeated(model: Model, params, length: int) -> float:
    """Operations a token of a train step, in rows of `length`, that `model.remat` computes again: a whole forward pass,
    or where the results of products are kept attention alone (`llm.nn.remat`).
    """
    forward = model.flops_per_token(params, length)
    attention = forward - model.flops_per_token(params, 0)
    return {"": 0.0, "all": forward, "dots": attention, "dots_no_batch": attention}[model.spec.remat]
