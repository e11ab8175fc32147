"""Token and position tables."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.packed import Packed, product, unpack
from llm.nn.parameter import matrix


class Embed(nn.Module):
    """A table of vectors, looked up by id, or multiplied with to give logits when the unembedding is tied to it.

    Attributes:
        entries, width: the table's shape.
        axes: logical names of its two axes.
        stddev: of the initial entries.
    """

    entries: int
    width: int
    axes: tuple[str, str] = ("vocab", "embed")
    stddev: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.normal(self.stddev)
        self.table_VD = matrix(self, "table", init, self.axes, (self.entries, self.width))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors x_BTD of the ids."""
        if isinstance(self.table_VD, Packed):
            return unpack(self.table_VD[ids_BT]).astype(self.dtype)
        return self.table_VD[ids_BT].astype(self.dtype)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV, the products with every entry."""
        if isinstance(self.table_VD, Packed):
            flat = product(hidden_BTD.reshape(-1, self.width), self.table_VD)
            return flat.reshape(*hidden_BTD.shape[:-1], self.entries)
        return jnp.einsum(
            "...D,VD->...V",
            hidden_BTD,
            self.table_VD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
