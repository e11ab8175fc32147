"""Positions: rotary, with the published ways to stretch them, and sinusoids."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("linear", "ntk", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How rotary positions turn.

    Attributes:
        base: of the frequencies, base^(-2i/H).
        scaling: how a model that was trained on `original_context` positions is stretched by `factor`: "linear"
            divides all positions (Chen et al. 2023); "ntk" raises the base; "llama3" divides the slow frequencies and
            blends between `low_frequency` and `high_frequency` turns per original context; "yarn" blends between
            `slow_turns` and `fast_turns` and sharpens the scores (Peng et al. 2023). "" does not stretch.
        factor, original_context, low_frequency, high_frequency, fast_turns, slow_turns: as above.
    """

    base: float = 10000.0
    scaling: str = ""
    factor: float = 1.0
    original_context: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0

    def frequencies(self, head_width: int) -> np.ndarray:
        """The angle of one position for each pair of features, float64 of shape (H / 2,)."""
        half = head_width // 2
        base = self.base
        if self.scaling == "ntk":
            base *= self.factor ** (head_width / (head_width - 2))
        plain = base ** (-np.arange(half, dtype=np.float64) / half)
        if self.scaling in ("", "ntk"):
            return plain
        stretched = plain / self.factor
        if self.scaling == "linear":
            return stretched
        turns = self.original_context * plain / (2 * math.pi)
        if self.scaling == "llama3":
            keep = np.clip((turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0, 1)
        else:  # yarn: a ramp over the index of the pair, between the pairs that turn so often
            first, last = (
                half * math.log(self.original_context / (n * 2 * math.pi)) / math.log(self.base)
                for n in (self.fast_turns, self.slow_turns)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), head_width - 1)
            keep = 1 - np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
        return keep * plain + (1 - keep) * stretched

    @property
    def magnitude(self) -> float:
        """The factor on rotated queries and on keys: yarn's, which sharpens the scores of stretched models."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" and self.factor > 1 else 1.0


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, rope: Rope = Rope()) -> jax.Array:
    """Rotates pairs of features of each head by angles proportional to the position (Su et al. 2021).

    Feature i is paired with feature i + H/2 (the convention of GPT-NeoX and Hugging Face's Llama). Angles are float32
    whatever the dtype of x: in bfloat16 positions above 256 would collide.
    """
    frequencies = jnp.asarray(rope.frequencies(x_BTNH.shape[-1]), jnp.float32)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def sinusoids(positions_BT: jax.Array, width: int, halves: bool = False) -> jax.Array:
    """Vectors of positions, float32 (B, T, width): sines at even features, cosines at odd ones (Vaswani et al. 2017).

    Feature 2i turns by 10000^(-2i/width) a position; feature 2i + 1 is its cosine. With `halves` all sines come first,
    then all cosines, as in Marian.
    """
    pairs = np.arange((width + 1) // 2)
    frequencies = jnp.asarray(10000.0 ** (-2.0 * pairs / width), jnp.float32)
    angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies
    if halves:
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
    vectors = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return vectors.reshape(*positions_BT.shape, -1)[..., :width]
