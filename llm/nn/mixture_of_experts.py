"""A mixture of experts in place of a block's MLP: each token goes through the few experts that a router picks."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm.nn.mlp import ACTIVATIONS
from llm.nn.parameter import parameter
from llm.sharding import free_axes, split


@dataclasses.dataclass(frozen=True)
class ExpertSettings:
    """experts: how many there are; chosen: how many of them a token goes through."""

    experts: int
    chosen: int = 2


class MixtureOfExperts(nn.Module):
    """Top-k routing without a capacity: no token is dropped, so a row does not depend on its batch.

    The weights of the chosen experts are their router probabilities, divided by their sum (Mixtral).
    """

    settings: ExpertSettings
    ff_width: int
    activation: str = "silu"
    gated: bool = True
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None):
        """Returns (y_BTD, {"balance": (sum, weight), "router_z": (sum, weight)}).

        balance is the load-balancing loss of Fedus et al. 2021, E sum_e f_e p_e over the real tokens of the call (one
        micro-batch, on whatever devices), with f_e the share of choices that fell on expert e and p_e its mean
        probability; 1 is even. router_z is the mean over them of the squared log-sum-exp of the router's logits (Zoph
        et al. 2022, ST-MoE). Both come multiplied with the number of real tokens, the weight.
        """
        s, width = self.settings, x_BTD.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        router_DE = parameter(self, "router", init, ("embed", "experts"), (width, s.experts))
        # float32: the choice must not depend on the compute dtype's rounding of close probabilities
        logits_BTE = x_BTD.astype(jnp.float32) @ router_DE
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        weights_BTk, chosen_BTk = jax.lax.top_k(probabilities_BTE, s.chosen)
        weights_BTk /= weights_BTk.sum(-1, keepdims=True)

        def each(name: str, inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> jax.Array:
            init = nn.initializers.normal(scale * inputs**-0.5)
            kernel = parameter(self, name, init, ("experts", *axes), (s.experts, inputs, outputs))
            return kernel.astype(self.dtype)

        names = ("gate", "up") if self.gated else ("up",)
        kernels = {name: each(name, width, self.ff_width, ("embed", "mlp")) for name in names}
        kernels["down"] = each("down", self.ff_width, width, ("mlp", "embed"), self.output_scale)
        y_BTD = _dispatch(
            self.activation, x_BTD.astype(self.dtype), chosen_BTk, weights_BTk.astype(self.dtype), kernels
        )

        real_BT = jnp.ones(x_BTD.shape[:2], jnp.float32) if real_BT is None else real_BT.astype(jnp.float32)
        count = real_BT.sum()

        def mean(values_BTE):
            return jnp.einsum("BT,BTE->E", real_BT, values_BTE) / jnp.maximum(count, 1.0)

        picked_BTE = jax.nn.one_hot(chosen_BTk, s.experts).mean(2)
        balance = s.experts * jnp.sum(mean(picked_BTE) * mean(probabilities_BTE))
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
        return y_BTD, {"balance": (balance * count, count), "router_z": (jnp.sum(real_BT * z_BT), count)}


def _dispatch(activation: str, x_BTD, chosen_BTk, weights_BTk, kernels: dict[str, jax.Array]) -> jax.Array:
    """What the chosen experts make of the tokens, on the current mesh.

    Rows and places are split as activations are, experts and their hidden layer as the kernels are. A device that has
    some of the experts is given the tokens of all devices that share its rows but have others (an all-gather), and
    each of those gets back its own tokens' sums (a reduce-scatter): with e devices, e - 1 times the device's tokens
    travel each way, whatever the router picks, and no buffer has to be sized by the worst case of an exchange. The
    products are of the picked rows alone.
    """
    free = free_axes()
    if not free:
        return _through(activation, x_BTD, chosen_BTk, weights_BTk, kernels, 0)
    rows, places = split("batch", x_BTD.shape[0]), split("length", x_BTD.shape[1])
    experts, hidden = split("experts", kernels["down"].shape[0]), split("mlp", kernels["down"].shape[1])
    shared = tuple(axis for axis in experts or () if axis in (rows or ()))

    def on_one(x_BTD, chosen_BTk, weights_BTk, kernels):
        if shared:
            x_BTD, chosen_BTk, weights_BTk = jax.lax.all_gather(
                (x_BTD, chosen_BTk, weights_BTk), shared, axis=0, tiled=True
            )
        first = jax.lax.axis_index(experts) * kernels["down"].shape[0] if experts else 0
        y_BTD = _through(activation, x_BTD, chosen_BTk, weights_BTk, kernels, first)
        if summed := tuple(axis for axis in (*(experts or ()), *(hidden or ())) if axis not in shared):
            y_BTD = jax.lax.psum(y_BTD, summed)
        return jax.lax.psum_scatter(y_BTD, shared, scatter_dimension=0, tiled=True) if shared else y_BTD

    token = PartitionSpec(rows, places, None)
    places_of = {name: PartitionSpec(experts, None, hidden) for name in kernels}
    places_of["down"] = PartitionSpec(experts, hidden, None)
    return jax.shard_map(
        on_one,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=(token, token, token, places_of),
        out_specs=token,
        check_vma=False,
    )(x_BTD, chosen_BTk, weights_BTk, kernels)


def _through(activation: str, x_BTD, chosen_BTk, weights_BTk, kernels: dict[str, jax.Array], first) -> jax.Array:
    """The tokens' weighted sums over those of their experts whose kernels these are, the experts from `first` on.

    Rows, one a token and choice, are sorted by expert, and each expert multiplies its own run of them
    (`jax.lax.ragged_dot`); the rows of other experts come last and give 0.
    """
    (B, T, width), chosen = x_BTD.shape, chosen_BTk.shape[2]
    experts = kernels["down"].shape[0]
    expert_R = chosen_BTk.reshape(-1) - first
    mine_R = (expert_R >= 0) & (expert_R < experts)
    expert_R = jnp.where(mine_R, expert_R, experts)
    order = jnp.argsort(expert_R, stable=True)
    sizes_E = jnp.bincount(expert_R, length=experts + 1)[:experts].astype(jnp.int32)
    rows_RD = x_BTD.reshape(-1, width)[order // chosen]

    def each(name: str, rows):
        return jax.lax.ragged_dot(rows, kernels[name], sizes_E)

    h_RF = ACTIVATIONS[activation](each("gate" if "gate" in kernels else "up", rows_RD))
    if "gate" in kernels:
        h_RF *= each("up", rows_RD)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    out_RD = jnp.where(mine_R[:, None], each("down", h_RF)[back], 0)
    return jnp.einsum("BTkD,BTk->BTD", out_RD.reshape(B, T, chosen, width), weights_BTk)
