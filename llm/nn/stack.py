"""Layers on top of each other, with one parameter layout: every parameter has a leading axis over the layers."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention.target import target
from llm.nn.block import Block, BlockSettings, Surroundings
from llm.nn.remat import rematerialised


class Stack(nn.Module):
    """`layers` blocks, scanned over.

    Attributes:
        windows: the attention windows of the layers in turn, (None, 256) for dense and banded ones alternating. Each
            place of the pattern has parameters of its own, `layers/block_0`, ..., with a leading axis over the
            rounds; layer i is entry i // p of `block_{i % p}`. One window for all gives one tree, `layers`.
        unroll: rounds of the pattern that one round of the loop holds. All of them gives the compiler a straight
            program, faster on CPU; 1 compiles fastest.
        remat: what a block computes again in the backward pass (`llm.nn.remat`).
    """

    settings: BlockSettings
    layers: int
    train: bool
    unroll: int = 1
    remat: str = ""
    windows: tuple[int | None, ...] = (None,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, around: Surroundings, cache: tuple[tuple[jax.Array, ...], ...] | None = None):
        """Returns (x_BTD, cache, aux): as `llm.nn.cache.KVCache.layers`, and the sums of the layers' extra losses."""
        pattern = len(self.windows)
        rounds = self.layers // pattern
        block = rematerialised(Block, self.remat)
        settings = [
            dataclasses.replace(self.settings, attention=dataclasses.replace(self.settings.attention, window=window))
            for window in self.windows
        ]

        if rounds == 1 and cache is not None and not self.train:
            return self._straight(settings, x_BTD, around, cache)

        def scanned(body) -> Any:
            return nn.scan(
                body,
                variable_axes={"params": 0, "intermediates": 0},  # recorded activations come stacked too
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                out_axes=0,
                length=rounds,
                unroll=self.unroll,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )

        if pattern == 1:
            layer = scanned(block)(settings[0], self.train, self.dtype, name="layers")
            x_BTD, (mine, aux) = layer(x_BTD, around, None if cache is None else cache[0])
            cache = None if cache is None else (mine,)
        else:
            layer = scanned(_Round)(block, tuple(settings), self.train, self.dtype, name="layers")
            x_BTD, (cache, aux) = layer(x_BTD, around, cache)
        return x_BTD, cache, {name: (total.sum(), weight.sum()) for name, (total, weight) in aux.items()}

    def _straight(self, settings, x_BTD, around: Surroundings, cache):
        """What `__call__` returns, of layers that are each a place of the pattern.

        A loop of one round would copy the cache in and out, and tracing every layer takes seconds: those of the same
        settings are traced once.
        """
        params = self.get_variable("params", "layers")
        kept, losses = [], []
        for i, one in enumerate(settings):
            own = params if len(settings) == 1 else params[f"block_{i}"]
            own, mine = jax.tree.map(lambda x: x[0], (own, cache[i]))
            block = Block(one, False, self.dtype, parent=None)
            x_BTD, (mine, aux) = _layer(block, target(), own, x_BTD, around, mine)
            kept.append(jax.tree.map(lambda x: x[None], mine))
            losses.append(aux)
        sums = jax.tree.map(lambda *parts: sum(parts), *losses)
        return x_BTD, tuple(kept), sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(block: Block, device, params, x_BTD, around: Surroundings, cache):
    del device  # what is traced for one is not for another
    return block.apply({"params": params}, x_BTD, around, cache)


class _Round(nn.Module):
    """One round of a pattern of blocks."""

    block: Any
    settings: tuple[BlockSettings, ...]
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, around: Surroundings, cache=None):
        kept, losses = [], []
        for i, settings in enumerate(self.settings):
            layer = self.block(settings, self.train, self.dtype, name=f"block_{i}")
            x_BTD, (mine, aux) = layer(x_BTD, around, None if cache is None else cache[i])
            kept.append(mine)
            losses.append(aux)
        return x_BTD, (None if cache is None else tuple(kept), jax.tree.map(lambda *parts: sum(parts), *losses))
