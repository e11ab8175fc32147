"""One Transformer block, the unit that every family stacks."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import Mask
from llm.nn.mlp import MLP
from llm.nn.multi_head_attention import AttentionSettings, MultiHeadAttention
from llm.nn.norm import Norm
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """How one block is built.

    Attributes:
        attention: its attention layer.
        ff_width, activation, gated: its MLP.
        norm, epsilon: kind and epsilon of its norms, applied before each part (pre-norm).
        bias: adds biases in the MLP.
        dropout: on the output of both parts.
    """

    attention: AttentionSettings
    ff_width: int
    activation: str = "gelu"
    gated: bool = False
    norm: str = "rms"
    epsilon: float = 1e-6
    bias: bool = False
    dropout: float = 0.0


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    settings: BlockSettings
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache=None):
        """Returns (x_BTD, cache)."""
        s = self.settings
        drop = nn.Dropout(s.dropout, deterministic=not self.train)
        h_BTD = Norm(s.norm, s.epsilon, self.dtype, name="attention_norm")(x_BTD)
        h_BTD, cache = MultiHeadAttention(s.attention, self.train, self.dtype, name="attention")(
            h_BTD, mask, positions_BT, cache
        )
        x_BTD = x_BTD + drop(h_BTD)
        h_BTD = Norm(s.norm, s.epsilon, self.dtype, name="mlp_norm")(x_BTD)
        h_BTD = MLP(s.ff_width, s.activation, s.gated, s.bias, s.attention.output_scale, self.dtype, name="mlp")(h_BTD)
        return constrain(x_BTD + drop(h_BTD), "batch", "length", "activation"), cache
