"""Layers on top of each other, with one parameter layout: every parameter has a leading axis over the layers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import Mask
from llm.nn.block import Block, BlockSettings
from llm.nn.cache import KVCache


class Stack(nn.Module):
    """`layers` blocks, scanned over.

    Attributes:
        unroll: layers that one round of the loop holds. All of them gives the compiler a straight program, faster on
            CPU; 1 compiles fastest.
        remat: recompute a block's activations in the backward pass instead of keeping them.
    """

    settings: BlockSettings
    layers: int
    train: bool
    unroll: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache: KVCache | None = None):
        """Returns (x_BTD, cache); the cache's lengths are the caller's to advance."""
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scanned: Any = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},  # recorded activations come stacked too
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            out_axes=0,
            length=self.layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        x_BTD, layers = scanned(self.settings, self.train, self.dtype, name="layers")(x_BTD, mask, positions_BT, layers)
        if cache is not None:
            cache = dataclasses.replace(cache, k_LBSKH=layers[0], v_LBSKH=layers[1])
        return x_BTD, cache
