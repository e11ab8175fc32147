"""From the hidden states of a row to one vector, and from that to a class."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.parameter import parameter
from llm.nn.projection import Projection

POOLINGS = ("mean", "max", "first", "last")


def pool(hidden_BTD: jax.Array, real_BT: jax.Array, kind: str) -> jax.Array:
    """One vector a row, pooled_BD, over its real places alone; zeros for a row that has none.

    Args:
        hidden_BTD: hidden states.
        real_BT: bool, False at padding, on either side of a row.
        kind: "mean", "max", the "first" or the "last" place.
    """
    any_B1 = real_BT.any(-1, keepdims=True)
    if kind == "mean":
        total_BD = jnp.where(real_BT[..., None], hidden_BTD, 0).sum(1, dtype=jnp.float32)
        return (total_BD / jnp.maximum(real_BT.sum(-1, keepdims=True), 1)).astype(hidden_BTD.dtype)
    if kind == "max":
        lowest = jnp.finfo(hidden_BTD.dtype).min
        return jnp.where(any_B1, jnp.where(real_BT[..., None], hidden_BTD, lowest).max(1), 0)
    place_B = real_BT.argmax(-1) if kind == "first" else real_BT.shape[1] - 1 - real_BT[:, ::-1].argmax(-1)
    return jnp.where(any_B1, hidden_BTD[jnp.arange(hidden_BTD.shape[0]), place_B], 0)


class BagOfWords(nn.Module):
    """A linear classifier of the tokens that a row holds, whatever their order: the bag's share of the logits.

    A token's feature is 1 + log of its count; the features of a row have length `scale`, which says how fast the map
    learns beside the rest of a model. It starts at zero. With `pairs` the bag also holds neighbouring tokens, hashed
    into so many entries (Joulin et al. 2017).
    """

    vocab_size: int
    classes: int
    scale: float
    pairs: int = 0

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """float32 logits_BC."""
        entries = self.vocab_size + self.pairs
        kernel_VC = parameter(self, "kernel", nn.initializers.zeros, ("vocab", "classes"), (entries, self.classes))
        if self.pairs:
            first, second = (x.astype(jnp.uint32) for x in (tokens_BT[:, :-1], tokens_BT[:, 1:]))
            mixed = (first * jnp.uint32(0x9E3779B1) + second) * jnp.uint32(0x85EBCA6B)
            hashed_BT = ((mixed ^ (mixed >> 15)) % jnp.uint32(self.pairs)).astype(jnp.int32)
            tokens_BT = jnp.concatenate([tokens_BT, self.vocab_size + hashed_BT], axis=1)
            real_BT = jnp.concatenate([real_BT, real_BT[:, :-1] & real_BT[:, 1:]], axis=1)
        rows = jnp.arange(tokens_BT.shape[0])[:, None]
        counts_BV = jnp.zeros((tokens_BT.shape[0], entries)).at[rows, tokens_BT].add(real_BT.astype(jnp.float32))
        bag_BV = jnp.where(counts_BV > 0, 1 + jnp.log(jnp.maximum(counts_BV, 1)), 0)
        bag_BV *= self.scale / jnp.maximum(jnp.linalg.norm(bag_BV, axis=-1, keepdims=True), 1e-6)
        return bag_BV @ kernel_VC


class ClassHead(nn.Module):
    """Logits of the classes from a pooled vector, after dropout; `bag` above 0 adds a `BagOfWords` of that scale."""

    classes: int
    dropout: float
    vocab_size: int
    bag: float
    pairs: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled_BD: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array, train: bool) -> jax.Array:
        """float32 logits_BC."""
        width = pooled_BD.shape[-1]
        x_BD = nn.Dropout(self.dropout, deterministic=not train)(pooled_BD)
        axes = ("embed", "classes")
        logits_BC = Projection((width,), (self.classes,), axes, bias=True, dtype=self.dtype, name="output")(x_BD)
        logits_BC = logits_BC.astype(jnp.float32)
        if self.bag:
            logits_BC += BagOfWords(self.vocab_size, self.classes, self.bag, self.pairs, name="bag")(tokens_BT, real_BT)
        return logits_BC
