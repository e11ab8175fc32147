"""Losses. Each returns {name: (sum, weight)}; the one division happens at the very end.

"loss" is what is minimised; other names are only reported. Sums and weights add up over micro-batches, devices and
padding, so none of these changes the result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm.models import Model

Sums = dict[str, tuple[jax.Array, jax.Array]]


def cross_entropy(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 of shape (N,)."""
    logits_NV = logits_NV.astype(jnp.float32)
    picked_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=-1) - picked_N


def chunked_cross_entropy(
    unembed: Callable, params, hidden_ND: jax.Array, targets_N: jax.Array, chunk: int | None
) -> jax.Array:
    """The cross-entropies of unembed(params, hidden), shape (N,), with the logits of `chunk` tokens at a time.

    Equal to computing them all at once, which None does, up to the order of the sums in the gradient. Logits of a
    chunk are computed anew in the backward pass, so that memory does not grow with N x V.
    """

    def of_chunk(params, hidden_CD, targets_C):
        return cross_entropy(unembed(params, hidden_CD), targets_C)

    tokens = hidden_ND.shape[0]
    if chunk is None or chunk >= tokens:
        return of_chunk(params, hidden_ND, targets_N)
    short = -tokens % chunk
    hidden = jnp.pad(hidden_ND, ((0, short), (0, 0))).reshape(-1, chunk, hidden_ND.shape[1])
    targets = jnp.pad(targets_N, (0, short)).reshape(-1, chunk)
    body = jax.checkpoint(lambda _, parts: (None, of_chunk(params, *parts)))
    _, nats = jax.lax.scan(body, None, (hidden, targets))
    return nats.reshape(-1)[:tokens]


def token_losses(model: Model, loss_chunk: int | None) -> Callable[..., jax.Array]:
    """f(params, batch, dropout_key=None) -> nats_BT, the cross-entropy at every place, its weight not applied.

    Dropout acts when a key is given.
    """

    def unembed(params, hidden):
        return model.apply({"params": params}, hidden, method="unembed")

    def nats(params, batch: dict, dropout_key: jax.Array | None = None) -> jax.Array:
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None
        hidden_BTD = model.apply({"params": params}, batch, train=train, rngs=rngs).hidden_BTD
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        read = {name: params[name] for name in model.unembedding}
        nats_N = chunked_cross_entropy(unembed, read, hidden_ND, batch["targets"].reshape(-1), loss_chunk)
        return nats_N.reshape(batch["targets"].shape)

    return nats


def next_token(model: Model, loss_chunk: int | None) -> Callable[..., Sums]:
    """The loss of next-token prediction: f(params, batch, dropout_key=None) -> {"loss": (nats, trained tokens)}."""
    nats = token_losses(model, loss_chunk)

    def loss(params, batch: dict, dropout_key: jax.Array | None = None) -> Sums:
        weights_BT = batch["weights"]
        return {"loss": (jnp.sum(nats(params, batch, dropout_key) * weights_BT), weights_BT.sum())}

    return loss
