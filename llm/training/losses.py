"""Losses. Each returns {name: (sum, weight)}; the one division happens at the very end.

"loss" is what is minimised; other names are only reported. Sums and weights add up over micro-batches, devices and
padding, so none of these changes the result. Three exceptions, by their nature: a mixture of experts is balanced over
each micro-batch, the contrastive loss compares all rows of the batch and refuses micro-batches, and what is minimised
beside a masked language model counts a row as so many tokens as it has to predict on average.

`OBJECTIVES` says for each objective of `llm.data` what it computes; `build` makes the loss of a run from that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.data.spec import ObjectiveSpec
from llm.models import Model
from llm.training.spec import TrainingSpec

Sums = dict[str, tuple[jax.Array, jax.Array]]


def cross_entropy(logits_NV: jax.Array, targets_N: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 of shape (N,).

    With label smoothing the target is 1 - smoothing on the right id and smoothing / V on every id, that one included
    (Szegedy et al. 2016); the constant entropy of that is not taken off.
    """
    logits_NV = logits_NV.astype(jnp.float32)
    picked_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    if smoothing:
        picked_N = (1 - smoothing) * picked_N + smoothing * logits_NV.mean(-1)
    return jax.nn.logsumexp(logits_NV, axis=-1) - picked_N


def z_terms(logits_NV: jax.Array, z_loss: float) -> jax.Array | None:
    """z_loss times the squared log-sum-exp of the logits, float32 of shape (N,); None where z_loss is 0.

    A softmax does not see what is added to all its logits; this keeps them from drifting (Chowdhery et al. 2022,
    arXiv 2204.02311, section 5, with 1e-4).
    """
    if not z_loss:
        return None
    return z_loss * jnp.square(jax.nn.logsumexp(logits_NV.astype(jnp.float32), axis=-1))


def chunked_cross_entropy(
    unembed: Callable,
    params,
    hidden_ND: jax.Array,
    targets_N: jax.Array,
    chunk: int | None,
    smoothing: float = 0.0,
    wanted_N: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array | None]:
    """The cross-entropies and the `z_terms` of unembed(params, hidden), with the logits of `chunk` tokens at a time.

    Equal to computing them all at once, which None does, up to the order of the sums in the gradient. Logits of a
    chunk are computed anew in the backward pass, so that memory does not grow with N x V.

    Args:
        wanted_N: bool; where False the results are 0. With a chunk, tokens that are wanted come first, and chunks
            without any are skipped: a masked language model predicts one token in seven.
    """

    def of_chunk(params, hidden_CD, targets_C):
        logits_CV = unembed(params, hidden_CD)
        return cross_entropy(logits_CV, targets_C, smoothing), z_terms(logits_CV, z_loss)

    tokens = hidden_ND.shape[0]
    if chunk is None or chunk >= tokens:
        found = of_chunk(params, hidden_ND, targets_N)
        return found if wanted_N is None else jax.tree.map(lambda x_N: jnp.where(wanted_N, x_N, 0.0), found)
    order_N, count = None, tokens
    if wanted_N is not None:
        order_N, count = jnp.argsort(~wanted_N, stable=True), wanted_N.sum()
        hidden_ND, targets_N = hidden_ND[order_N], targets_N[order_N]
    short = -tokens % chunk

    def cut(x):
        x = jnp.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)))
        if order_N is not None:
            return x.reshape(-1, chunk, *x.shape[1:])
        # Tokens are dealt out in turn, so that each chunk lies on all devices like the batch does: a scan over chunks
        # that lie on one device each would send every chunk, logits and all, to all others.
        return x.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)

    hidden, targets = cut(hidden_ND), cut(targets_N)
    compute = jax.checkpoint(of_chunk)

    def body(_, parts):
        index, hidden_CD, targets_C = parts
        if wanted_N is None:
            return None, compute(params, hidden_CD, targets_C)
        skip = lambda *_: (jnp.zeros((chunk,)), jnp.zeros((chunk,)) if z_loss else None)  # noqa: E731
        return None, jax.lax.cond(index * chunk < count, compute, skip, params, hidden_CD, targets_C)

    def put_back(x):
        if order_N is None:
            return x.T.reshape(-1)[:tokens]
        x_N = x.reshape(-1)[:tokens]
        return jnp.zeros_like(x_N).at[order_N].set(jnp.where(jnp.arange(tokens) < count, x_N, 0.0))

    _, found = jax.lax.scan(body, None, (jnp.arange(len(hidden)), hidden, targets))
    return jax.tree.map(put_back, found)


# --- what each objective computes -------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What an objective says of a batch.

    Attributes:
        loss: (nats, weights), alike in shape, rows first: of places (B, T) or of rows (B,).
        reported: other values and weights by name.
        added: sums of nats that are minimised beside the loss, by name, and the weight each is reported with.
        cache: what a model that carries a state hands to the next batch.
    """

    loss: tuple[jax.Array, jax.Array]
    reported: dict[str, tuple[jax.Array, jax.Array]] = {}
    added: dict[str, tuple[jax.Array, jax.Array]] = {}
    cache: Any = None


class Settings(NamedTuple):
    """What the terms depend on beside model and batch."""

    loss_chunk: int | None = None
    smoothing: float = 0.0
    balance_weight: float = 0.0
    router_z_weight: float = 0.0
    temperature: float = 0.05
    masked_share: float = 0.15
    beta: float = 0.1
    z_loss: float = 0.0


def _run(model: Model, params, batch: dict, key, cache=None):
    train = key is not None
    rngs = {"dropout": jax.random.fold_in(key, 0)} if train else None
    return model.apply({"params": params}, batch, cache=cache, train=train, rngs=rngs)


def _head(model: Model, params, name: str, key, *args):
    """A head that drops out by itself, with a key of its own."""
    rngs = None if key is None else {"dropout": jax.random.fold_in(key, 1)}
    return model.apply({"params": params}, *args, train=key is not None, rngs=rngs, method=name)


def _language(model: Model, s: Settings, params, batch: dict, key, cache=None) -> Terms:
    """Prediction of targets: next tokens, those of a decoder."""
    return _predicted(model, s, params, batch, _run(model, params, batch, key, cache))


def _predicted(model: Model, s: Settings, params, batch: dict, output, sparse: bool = False) -> Terms:
    """The targets' terms from a model's output; `sparse` leaves out places of weight 0."""
    hidden_ND = output.hidden_BTD.reshape(-1, output.hidden_BTD.shape[-1])
    weights_BT = batch["weights"]

    def unembed(params, hidden):
        return model.apply({"params": params}, hidden, method="unembed")

    nats_N, z_N = chunked_cross_entropy(
        unembed, {name: params[name] for name in model.unembedding}, hidden_ND, batch["targets"].reshape(-1),
        s.loss_chunk, s.smoothing, weights_BT.reshape(-1) != 0 if sparse else None, s.z_loss,
    )  # fmt: skip
    nats_BT = nats_N.reshape(weights_BT.shape)
    # A mean over a mixture's tokens becomes nats by what the loss weighs.
    shares = {"balance": s.balance_weight, "router_z": s.router_z_weight}
    added = {
        name: (shares[name] * total / jnp.maximum(weight, 1.0) * weights_BT.sum(), weights_BT.sum())
        for name, (total, weight) in output.aux.items()
    }
    added |= _z_added(z_N, weights_BT.reshape(-1))
    return Terms((nats_BT, weights_BT), added=added, cache=output.cache)


def _z_added(z_N: jax.Array | None, weights_N: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`z_terms` as a loss of their own, which weighs what the cross-entropies weigh."""
    return {} if z_N is None else {"z_loss": (jnp.sum(z_N * weights_N), weights_N.sum())}


def _masked(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    """Masked tokens, and of pairs whether the second part goes on."""
    output = _run(model, params, batch, key)
    terms = _predicted(model, s, params, batch, output, sparse=True)
    if "label_weights" not in batch:
        return terms
    logits_B2 = model.apply({"params": params}, output.hidden_BTD, batch, method="next_sentence")
    nats_B = cross_entropy(logits_B2, batch["labels"])
    right_B = (logits_B2.argmax(-1) == batch["labels"]).astype(jnp.float32)
    weights_B = batch["label_weights"]
    predicted = s.masked_share * batch["tokens"].shape[1]
    added = {"next_sentence": (predicted * (nats_B * weights_B).sum(), predicted * weights_B.sum())}
    return terms._replace(added=terms.added | added, reported={"next_sentence_accuracy": (right_B, weights_B)})


def _classification(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    hidden_BTD = _run(model, params, batch, key).hidden_BTD
    logits_BC = _head(model, params, "classify", key, hidden_BTD, batch)
    nats_B = cross_entropy(logits_BC, batch["labels"], s.smoothing)
    right_B = (logits_BC.argmax(-1) == batch["labels"]).astype(jnp.float32)
    added = _z_added(z_terms(logits_BC, s.z_loss), batch["weights"])
    return Terms((nats_B, batch["weights"]), {"accuracy": (right_B, batch["weights"])}, added)


def _span_qa(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    """The mean of both ends' cross-entropies over the places of the row (Devlin et al. 2019)."""
    hidden_BTD = _run(model, params, batch, key).hidden_BTD
    real_BT = batch["segments"] != 0
    sides = model.apply({"params": params}, hidden_BTD, method="spans")
    sides = [jnp.where(real_BT, logits_BT, -1e9) for logits_BT in sides]
    nats_B, right_B = jnp.zeros(()), jnp.ones(())
    for logits_BT, places_B in zip(sides, (batch["starts"], batch["ends"])):
        nats_B += 0.5 * cross_entropy(logits_BT, places_B)
        right_B *= (logits_BT.argmax(-1) == places_B).astype(jnp.float32)
    z_2B = z_terms(jnp.stack(sides), s.z_loss)
    added = _z_added(None if z_2B is None else z_2B.mean(0), batch["weights"])
    return Terms((nats_B, batch["weights"]), {"accuracy": (right_B, batch["weights"])}, added)


def _contrastive(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    """Each text must find its source among all sources of the batch, and the other way round (van den Oord 2018)."""
    source = {name.removeprefix("source_"): x for name, x in batch.items() if name.startswith("source_")}
    a_BD, b_BD = (
        model.apply(
            {"params": params},
            _run(model, params, part, None if key is None else jax.random.fold_in(key, side)).hidden_BTD,
            part,
            method="sentence",
        )
        for side, part in enumerate((batch, source))
    )
    weights_B = batch["weights"]
    logits_BB = a_BD @ b_BD.T / s.temperature
    labels_B = jnp.arange(len(weights_B))
    nats_B = jnp.zeros(())
    for side_BB in (logits_BB, logits_BB.T):
        nats_B += 0.5 * cross_entropy(jnp.where(weights_B[None] > 0, side_BB, -1e9), labels_B)
    right_B = (jnp.where(weights_B[None] > 0, logits_BB, -1e9).argmax(-1) == labels_B).astype(jnp.float32)
    return Terms((nats_B, weights_B), {"accuracy": (right_B, weights_B)})


def _chat(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    """Prediction of the assistant's tokens; the others weigh nothing, and their logits are not computed."""
    return _predicted(model, s, params, batch, _run(model, params, batch, key), sparse=True)


def answer_log_probabilities(terms: Terms, batch: dict) -> jax.Array:
    """(B, 2) log-probabilities of the answers in segments 1 and 2, from the terms of `_chat`."""
    nats_BT, weights_BT = terms.loss
    answers = [batch["segments"] == number for number in (1, 2)]
    return -jnp.stack([jnp.sum(nats_BT * weights_BT * here_BT, axis=1) for here_BT in answers], axis=1)


def preference_terms(log_probabilities_B2, reference_B2, beta: float, smoothing: float = 0.0) -> dict[str, jax.Array]:
    """loss, accuracy, margin, chosen_reward and rejected_reward of each pair, by the answers' log-probabilities.

    DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7): an answer's reward is beta times the logarithm of how much
    likelier it has become, the margin that of the chosen one less that of the rejected one, the loss -log sigmoid of
    the margin. With `smoothing` the preference is taken to be the wrong way round with that probability (cDPO, Mitchell
    2023): (1 - smoothing) of that loss, and smoothing of that of the negative margin.
    """
    rewards_B2 = beta * (log_probabilities_B2 - reference_B2)
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    loss_B = (1 - smoothing) * jax.nn.softplus(-margin_B) + smoothing * jax.nn.softplus(margin_B)
    return {
        "loss": loss_B,
        "accuracy": (margin_B > 0).astype(jnp.float32),
        "margin": margin_B,
        "chosen_reward": rewards_B2[:, 0],
        "rejected_reward": rewards_B2[:, 1],
    }


def _preference(model: Model, s: Settings, params, batch: dict, key) -> Terms:
    """The loss of each pair against the log-probabilities in `batch["reference"]`; a row of zeros is none."""
    terms = _chat(model, s._replace(smoothing=0.0), params, batch, key)
    found = preference_terms(answer_log_probabilities(terms, batch), batch["reference"], s.beta, s.smoothing)
    pairs_B = (batch["weights"].sum(axis=1) > 0).astype(jnp.float32)
    # What is minimised beside it (a mixture's balance) is a mean over tokens, and counts once a pair.
    each = pairs_B.sum() / jnp.maximum(batch["weights"].sum(), 1.0)
    added = {name: (value * each, weight * each) for name, (value, weight) in terms.added.items()}
    return Terms((found.pop("loss"), pairs_B), {name: (value, pairs_B) for name, value in found.items()}, added)


class Objective(NamedTuple):
    """How an objective is learned.

    Attributes:
        terms: f(model, settings, params, batch, dropout key or None) -> Terms; "causal" also takes a cache.
        touch: f(module, batch): calls all parts of a module whose parameters the terms read.
    """

    terms: Callable[..., Terms]
    touch: Callable[[Any, dict], Any]


def _touch_language(module, batch):
    return module.unembed(module(batch).hidden_BTD)


def _touch_masked(module, batch):
    hidden = module(batch).hidden_BTD
    return module.unembed(hidden), module.next_sentence(hidden, batch)


OBJECTIVES: dict[str, Objective] = {
    **dict.fromkeys(
        ("causal", "prefix", "span_corruption", "continuation", "seq2seq"), Objective(_language, _touch_language)
    ),
    "chat": Objective(_chat, _touch_language),
    "preference": Objective(_preference, _touch_language),
    "masked": Objective(_masked, _touch_masked),
    "classification": Objective(_classification, lambda m, batch: m.classify(m(batch).hidden_BTD, batch)),
    "span_qa": Objective(_span_qa, lambda m, batch: m.spans(m(batch).hidden_BTD)),
    "contrastive": Objective(_contrastive, lambda m, batch: m.sentence(m(batch).hidden_BTD, batch)),
}


def settings(objective: ObjectiveSpec, training: TrainingSpec) -> Settings:
    """The settings of a run's loss."""
    return Settings(
        training.loss_chunk, training.label_smoothing, training.balance_weight,
        training.router_z_weight, training.temperature, objective.mask_rate, training.preference_beta,
        training.z_loss,
    )  # fmt: skip


def build(model: Model, objective: ObjectiveSpec, training: TrainingSpec) -> Callable[..., Any]:
    """The loss of a run: f(params, batch, dropout_key=None) -> sums by name.

    Of a model that carries a state, f(params, batch, dropout_key, cache) -> (sums, cache). Dropout acts when a key is
    given.
    """
    return sums(model, objective.kind, settings(objective, training))


def sums(model: Model, kind: str, s: Settings) -> Callable[..., Any]:
    """As `build`."""

    def summed(terms: Terms) -> Sums:
        nats, weights = terms.loss
        total = jnp.sum(nats * weights) + sum(value for value, _ in terms.added.values())
        found = {"loss": (total, weights.sum()), **terms.added}
        return found | {name: (jnp.sum(v * w), w.sum()) for name, (v, w) in terms.reported.items()}

    def loss(params, batch: dict, dropout_key: jax.Array | None = None) -> Sums:
        return summed(OBJECTIVES[kind].terms(model, s, params, batch, dropout_key))

    def carrying(params, batch: dict, dropout_key: jax.Array | None, cache):
        terms = OBJECTIVES[kind].terms(model, s, params, batch, dropout_key, cache)
        return summed(terms), jax.lax.stop_gradient(terms.cache)

    return carrying if model.carries else loss


def next_token(model: Model, loss_chunk: int | None) -> Callable[..., Sums]:
    """The loss of next-token prediction: f(params, batch, dropout_key=None) -> {"loss": (nats, trained tokens)}."""
    return sums(model, "causal", Settings(loss_chunk))


def row_losses(model: Model, kind: str, loss_chunk: int | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """f(params, batch) -> (nats_B, weights_B), the loss of each row without dropout and smoothing."""

    def rows(params, batch: dict):
        nats, weights = OBJECTIVES[kind].terms(model, Settings(loss_chunk), params, batch, None).loss
        axes = tuple(range(1, weights.ndim))
        return (nats * weights).sum(axes), weights.sum(axes)

    return rows


def pair_log_probabilities(model: Model, loss_chunk: int | None) -> Callable[..., jax.Array]:
    """f(params, batch) -> (B, 2), the log-probabilities of both answers of each pair, without dropout."""

    def pairs(params, batch: dict):
        return answer_log_probabilities(_chat(model, Settings(loss_chunk), params, batch, None), batch)

    return pairs
