"""Rows of a cache: every family keeps them at axis 1 of the arrays in `layers` and at axis 0 of all others."""

import dataclasses
from typing import Any

import jax


def take_rows(cache: Any, rows_R: jax.Array) -> Any:
    """The cache of these rows, in this order; a row may stand in it more than once."""
    return _each(lambda x, axis: x[:, rows_R] if axis else x[rows_R], cache)


def put_row(cache: Any, row: jax.Array, one: Any) -> Any:
    """The cache with the only row of `one` in the place of a row."""
    return _each(lambda x, axis, y: x.at[:, row].set(y[:, 0]) if axis else x.at[row].set(y[0]), cache, one)


def _each(function, cache, *others):
    changed = {}
    for field in dataclasses.fields(cache):
        if not field.metadata.get("pytree_node", True):  # a setting
            continue
        axis = int(field.name == "layers")
        values = [getattr(one, field.name) for one in (cache, *others)]
        changed[field.name] = jax.tree.map(lambda x, *more, axis=axis: function(x, axis, *more), *values)
    return dataclasses.replace(cache, **changed)
