"""Projections around `llm.attention`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import Mask
from llm.nn.cache import write
from llm.nn.norm import Norm
from llm.nn.position import rotary
from llm.nn.projection import Projection
from llm.sharding import attention, constrain


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """How one attention layer is built.

    Attributes:
        heads, kv_heads, head_width: N, K and H.
        bias: adds a bias to every projection.
        qk_norm: RMS-normalises queries and keys over the head width (Henry et al. 2020).
        rope_base: base of the rotary positions; None has none.
        window: keys before the query that it may see; None is all.
        dropout: on the attention weights.
        output_scale: factor on the initial standard deviation of the output projection.
        implementation: as in `llm.attention.attention`.
    """

    heads: int
    kv_heads: int
    head_width: int
    bias: bool = False
    qk_norm: bool = False
    rope_base: float | None = None
    window: int | None = None
    dropout: float = 0.0
    output_scale: float = 1.0
    implementation: str = "auto"


class MultiHeadAttention(nn.Module):
    """Self-attention over x_BTD, with an optional cache of earlier keys and values."""

    settings: AttentionSettings
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache=None):
        """Returns (y_BTD, cache). `cache` is this layer's (k_BSKH, v_BSKH) or None."""
        s, width = self.settings, x_BTD.shape[-1]

        def project(name, heads, axis):
            return Projection(
                (width,), (heads, s.head_width), ("embed", axis, "head_width"), s.bias, dtype=self.dtype, name=name
            )(x_BTD)

        q_BTNH = project("query", s.heads, "heads")
        k_BTKH = project("key", s.kv_heads, "kv_heads")
        v_BTKH = project("value", s.kv_heads, "kv_heads")
        if s.qk_norm:
            q_BTNH = Norm(dtype=self.dtype, name="query_norm")(q_BTNH)
            k_BTKH = Norm(dtype=self.dtype, name="key_norm")(k_BTKH)
        if s.rope_base is not None:
            q_BTNH, k_BTKH = rotary(q_BTNH, positions_BT, s.rope_base), rotary(k_BTKH, positions_BT, s.rope_base)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", "head_width")
        if cache is not None:
            cache = write(cache[0], k_BTKH, positions_BT), write(cache[1], v_BTKH, positions_BT)
        k_BSKH, v_BSKH = (k_BTKH, v_BTKH) if cache is None else cache
        if s.window is not None:
            mask = dataclasses.replace(mask, window=(s.window, None))
        dropout = s.dropout if self.train else 0.0
        y_BTNH = attention(
            q_BTNH,
            k_BSKH.astype(self.dtype),
            v_BSKH.astype(self.dtype),
            mask=mask,
            dropout_rate=dropout,
            dropout_key=self.make_rng("dropout") if dropout else None,
            implementation=s.implementation,
        )
        y_BTD = Projection(
            (s.heads, s.head_width),
            (width,),
            ("heads", "head_width", "embed"),
            s.bias,
            s.output_scale,
            self.dtype,
            name="output",
        )(y_BTNH)
        return constrain(y_BTD, "batch", "length", "activation"), cache
