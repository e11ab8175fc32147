"""Projections around `llm.attention`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import BucketBias, Mask
from llm.nn.cache import held_positions, write
from llm.nn.norm import Norm
from llm.nn.position import Rope, rotary
from llm.nn.projection import Projection, together
from llm.sharding import attention, constrain


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """How one attention layer is built.

    Attributes:
        heads, kv_heads, head_width: N, K and H.
        bias: adds a bias to the query, key and value.
        output_bias: adds one to the output.
        qk_norm, norm_epsilon: RMS-normalises queries and keys over the head width (Henry et al. 2020).
        rope: the rotary positions; None has none.
        window: keys before the query that it may see; None is all.
        scaled: divides scores by sqrt(H). T5 does not, its initial queries are smaller by that.
        score_scale: a further factor on scaled scores.
        dropout: on the attention weights.
        output_scale: factor on the initial standard deviation of the output projection.
        implementation: as in `llm.attention.attention`.
    """

    heads: int
    kv_heads: int
    head_width: int
    bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_epsilon: float = 1e-6
    rope: Rope | None = None
    window: int | None = None
    scaled: bool = True
    score_scale: float = 1.0
    dropout: float = 0.0
    output_scale: float = 1.0
    implementation: str = "auto"

    @classmethod
    def plain(cls, width: int, heads: int, bias: bool, dropout: float, implementation: str) -> "AttentionSettings":
        """Heads that share the width, each with its own keys, and a bias in all projections or in none."""
        return cls(heads, heads, width // heads, bias, bias, dropout=dropout, implementation=implementation)


class MultiHeadAttention(nn.Module):
    """Attention of x_BTD to itself or, with `cross`, to a source."""

    settings: AttentionSettings
    train: bool
    dtype: Any = jnp.float32
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask: Mask,
        positions_BT: jax.Array | None = None,
        bias: BucketBias | None = None,
        cache=None,
        source_BSD: jax.Array | None = None,
    ):
        """Returns (y_BTD, cache).

        `cache` is this layer's (k_BSKH, v_BSKH) or None: of the row so far, to which x_BTD is added at its positions, a
        ring where there is a window, and the mask then has kv_lengths_B, with x_BTD; of the source, which is read where
        source_BSD is None and replaced where it is given.
        """
        s = self.settings

        def projection(name: str, x, heads: int, axis: str, scale: float = 1.0) -> Projection:
            axes = ("embed", axis, "head_width")
            return Projection((x.shape[-1],), (heads, s.head_width), axes, s.bias, scale, self.dtype, name=name)

        query = projection("query", x_BTD, s.heads, "heads", 1.0 if s.scaled else s.head_width**-0.5)
        read = x_BTD if source_BSD is None else source_BSD
        key, value = (projection(name, read, s.kv_heads, "kv_heads") for name in ("key", "value"))
        if self.cross:
            q_BTNH = query(x_BTD)
            kept = cache
            if source_BSD is not None:
                k_BSKH, v_BSKH = together(source_BSD, key, value)
                kept = self._normed("key", k_BSKH), v_BSKH
            cache = None if cache is None else kept
        else:
            q_BTNH, k_BTKH, v_BTKH = together(x_BTD, query, key, value)
            k_BTKH = self._normed("key", k_BTKH)
        q_BTNH = constrain(self._normed("query", q_BTNH), "batch", "length", "heads", "head_width")
        if not self.cross:
            if s.rope is not None:
                assert positions_BT is not None
                q_BTNH, k_BTKH = rotary(q_BTNH, positions_BT, s.rope), rotary(k_BTKH, positions_BT, s.rope)
            kept = k_BTKH, v_BTKH
            if cache is not None:
                assert positions_BT is not None and mask.kv_lengths_B is not None
                cache = kept = write(cache, kept, positions_BT, mask.kv_lengths_B)
                if s.window is not None:
                    held_BS = held_positions(cache[0].shape[1], mask.kv_lengths_B)
                    mask = dataclasses.replace(mask, kv_positions_BS=held_BS)
            if s.window is not None:
                mask = dataclasses.replace(mask, window=(s.window, None if mask.causal else s.window))
        assert kept is not None, "a source or its cache"
        return self._attend(x_BTD, q_BTNH, kept[0], kept[1], mask, bias), cache

    def _normed(self, name: str, x: jax.Array) -> jax.Array:
        s = self.settings
        if not s.qk_norm:
            return x
        return Norm(epsilon=s.norm_epsilon, dtype=self.dtype, name=f"{name}_norm")(x)

    def _attend(self, x_BTD, q_BTNH, k_BSKH, v_BSKH, mask: Mask, bias: BucketBias | None):
        s = self.settings
        dropout = s.dropout if self.train else 0.0
        y_BTNH: Any = attention(
            q_BTNH,
            k_BSKH.astype(self.dtype),
            v_BSKH.astype(self.dtype),
            mask=mask,
            bias=bias,
            scale=s.score_scale * s.head_width**-0.5 if s.scaled else 1.0,
            dropout_rate=dropout,
            dropout_key=self.make_rng("dropout") if dropout else None,
            implementation=s.implementation,
        )
        width = x_BTD.shape[-1]
        axes = ("heads", "head_width", "embed")
        inputs = (s.heads, s.head_width)
        output = Projection(inputs, (width,), axes, s.output_bias, s.output_scale, self.dtype, name="output")
        y_BTD: Any = output(y_BTNH)
        return constrain(y_BTD, "batch", "length", "activation")
