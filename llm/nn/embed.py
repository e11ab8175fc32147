"""Token and position tables."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.parameter import parameter


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
        self.table_VD = parameter(self, "table", init, self.axes, (self.entries, self.width))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors x_BTD of the ids."""
        return self.table_VD[ids_BT].astype(self.dtype)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV, the products with every entry."""
        return jnp.einsum(
            "...D,VD->...V",
            hidden_BTD,
            self.table_VD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
