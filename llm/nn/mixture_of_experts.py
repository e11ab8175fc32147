"""A mixture of experts in place of a block's MLP: each token goes through the few experts that a router picks."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.mlp import ACTIVATIONS
from llm.nn.parameter import parameter


@dataclasses.dataclass(frozen=True)
class ExpertSettings:
    """experts: how many there are; chosen: how many of them a token goes through."""

    experts: int
    chosen: int = 2


class MixtureOfExperts(nn.Module):
    """Top-k routing without a capacity: no token is dropped, so a row does not depend on its batch.

    The weights of the chosen experts are their router probabilities, divided by their sum (Mixtral). Tokens are sorted
    by expert, and each expert multiplies its own run of rows (`jax.lax.ragged_dot`).
    """

    settings: ExpertSettings
    ff_width: int
    activation: str = "silu"
    gated: bool = True
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None):
        """Returns (y_BTD, {"balance": (sum, weight)}).

        balance is the load-balancing loss of Fedus et al. 2021, E sum_e f_e p_e over the real tokens of the call (one
        micro-batch), with f_e the share of choices that fell on expert e and p_e its mean probability; 1 is even. It
        comes multiplied with their number, the weight.
        """
        s, (B, T, width) = self.settings, x_BTD.shape
        x_MD = x_BTD.reshape(B * T, width)
        init = nn.initializers.normal(width**-0.5)
        router_DE = parameter(self, "router", init, ("embed", "experts"), (width, s.experts))
        # float32: the choice must not depend on the compute dtype's rounding of close probabilities
        probabilities_ME = jax.nn.softmax(x_MD.astype(jnp.float32) @ router_DE, axis=-1)
        weights_Mk, chosen_Mk = jax.lax.top_k(probabilities_ME, s.chosen)
        weights_Mk /= weights_Mk.sum(-1, keepdims=True)

        order = jnp.argsort(chosen_Mk.reshape(-1), stable=True)
        sizes_E = jnp.bincount(chosen_Mk.reshape(-1), length=s.experts).astype(jnp.int32)
        rows_RD = x_MD[order // s.chosen].astype(self.dtype)

        def each(name: str, inputs: int, outputs: int, axes: tuple[str, str], scale: float, rows):
            init = nn.initializers.normal(scale * inputs**-0.5)
            kernel = parameter(self, name, init, ("experts", *axes), (s.experts, inputs, outputs))
            return jax.lax.ragged_dot(rows, kernel.astype(self.dtype), sizes_E)

        def up(name: str):
            return each(name, width, self.ff_width, ("embed", "mlp"), 1.0, rows_RD)

        h_RF = ACTIVATIONS[self.activation](up("gate" if self.gated else "up"))
        if self.gated:
            h_RF *= up("up")
        out_RD = each("down", self.ff_width, width, ("mlp", "embed"), self.output_scale, h_RF)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
        y_MD = jnp.einsum("MkD,Mk->MD", out_RD[back].reshape(B * T, s.chosen, width), weights_Mk.astype(self.dtype))

        real_M = jnp.ones((B * T,), jnp.float32) if real_BT is None else real_BT.reshape(-1).astype(jnp.float32)
        count = jnp.maximum(real_M.sum(), 1.0)
        picked_ME = jax.nn.one_hot(chosen_Mk, s.experts).mean(1)
        balance = s.experts * jnp.sum((real_M @ picked_ME / count) * (real_M @ probabilities_ME / count))
        return y_MD.reshape(x_BTD.shape), {"balance": (balance * real_M.sum(), real_M.sum())}
