"""One Transformer block, the unit that every family stacks."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from llm.attention import BucketBias, Mask
from llm.nn.mixture_of_experts import ExpertSettings, MixtureOfExperts
from llm.nn.mlp import MLP
from llm.nn.multi_head_attention import AttentionSettings, MultiHeadAttention
from llm.nn.norm import Norm
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """How one block is built.

    Attributes:
        attention: its attention layer; that to the source is alike, without window and rotary positions.
        ff_width, activation, gated: its MLP.
        norm, epsilon: kind and epsilon of its norms.
        pre_norm: x + part(norm(x)); otherwise norm(x + part(x)), as published by Vaswani et al. 2017.
        cross: attends to a source as well.
        bias: adds biases in the MLP.
        dropout: on the output of each part.
        ff_dropout: inside the MLP, after the activation.
        experts: a mixture of experts in place of the MLP; None has the MLP.
    """

    attention: AttentionSettings
    ff_width: int
    activation: str = "gelu"
    gated: bool = False
    norm: str = "rms"
    epsilon: float = 1e-6
    pre_norm: bool = True
    cross: bool = False
    bias: bool = False
    dropout: float = 0.0
    ff_dropout: float = 0.0
    experts: ExpertSettings | None = None


@flax.struct.dataclass
class Surroundings:
    """What all blocks of a stack are given alike.

    Attributes:
        mask: who sees whom in the row.
        positions_BT: of the tokens, for rotary positions and for their places in a cache.
        bias: on the scores of the row.
        source_BSD: what `cross` attends to; None where the cache has its keys and values.
        source_mask: who sees what of the source.
        real_BT: bool, the places that are no padding; None is all. Only the balance of experts asks.
    """

    mask: Mask
    positions_BT: jax.Array | None = None
    bias: BucketBias | None = None
    source_BSD: jax.Array | None = None
    source_mask: Mask | None = None
    real_BT: jax.Array | None = None


class Block(nn.Module):
    """Attention, attention to the source if there is one, and the MLP, each with norm, dropout and residual."""

    settings: BlockSettings
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, around: Surroundings, cache=None):
        """Returns (x_BTD, (cache, aux)).

        `cache` is this layer's (k, v), with `cross` (k, v, source's k, source's v), or None; `aux` are named extra
        losses.
        """
        s = self.settings
        drop = nn.Dropout(s.dropout, deterministic=not self.train)
        aux: dict[str, tuple[jax.Array, jax.Array]] = {}

        def part(name: str, function, x):
            norm = Norm(s.norm, s.epsilon, self.dtype, name=f"{name}_norm")
            if s.pre_norm:
                y, more = function(norm(x))
                return x + drop(y), more
            y, more = function(x)
            return norm(x + drop(y)), more

        def attend(x):
            layer = MultiHeadAttention(s.attention, self.train, self.dtype, name="attention")
            return layer(x, around.mask, around.positions_BT, around.bias, None if cache is None else cache[:2])

        def attend_to_source(x):
            assert around.source_mask is not None
            settings = dataclasses.replace(s.attention, rope=None, window=None)
            layer = MultiHeadAttention(settings, self.train, self.dtype, cross=True, name="cross_attention")
            kept = None if cache is None else cache[2:]
            return layer(x, around.source_mask, cache=kept, source_BSD=around.source_BSD)

        def feed_forward(x):
            scale = s.attention.output_scale
            if s.experts is not None:
                experts = MixtureOfExperts(s.experts, s.ff_width, s.activation, s.gated, scale, self.dtype, name="moe")
                y, balance = experts(x, around.real_BT)
                aux.update(balance)
                return y, None
            drop = nn.Dropout(s.ff_dropout, deterministic=not self.train)
            mlp = MLP(s.ff_width, s.activation, s.gated, s.bias, scale, self.dtype, name="mlp")
            return mlp(x, drop), None

        x_BTD, kept = part("attention", attend, x_BTD)
        if s.cross:
            x_BTD, source = part("cross_attention", attend_to_source, x_BTD)
            if kept is not None and source is not None:
                kept = *kept, *source
        x_BTD, _ = part("mlp", feed_forward, x_BTD)
        return constrain(x_BTD, "batch", "length", "activation"), (kept, aux)
