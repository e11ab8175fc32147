"""Rotary positions."""

import jax
import jax.numpy as jnp


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotates pairs of features of each head by angles proportional to the position (Su et al. 2021).

    Feature i is paired with feature i + H/2 (the convention of GPT-NeoX and Hugging Face's Llama). Angles are float32
    whatever the dtype of x: in bfloat16 positions above 256 would collide.
    """
    half = x_BTNH.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
