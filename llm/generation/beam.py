"""Beam search over the explicit cache, whose rows follow their hypotheses."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import InputError
from llm.generation.constrained import Constraint, Matcher
from llm.generation.engine import CHUNK, Ends, begin_history, feed, lay_out, make_rules, prefill
from llm.generation.penalties import adjust_logits, only_allowed
from llm.generation.rows import take_rows
from llm.generation.spec import SamplingSpec
from llm.models import Model


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One way to continue a prompt.

    Attributes:
        tokens: without the one that ended it.
        log_probability: of all generated tokens together, that which ended it among them.
        score: log_probability / length ** length_penalty; the length too counts generated tokens alone, and the end.
        ended: "end" by an end of text, or by a match that nothing can be added to; "length" by the limit.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    ended: str


@dataclasses.dataclass(frozen=True)
class _Live:
    """A hypothesis in its place among the beams; where `matcher` shuts it off, nothing goes on from it."""

    tokens: tuple[int, ...] = ()
    matcher: Matcher | None = None
    stuck: InputError | None = None

    def grown(self, token: int) -> "_Live":
        tokens = (*self.tokens, token)
        if self.matcher is None:
            return _Live(tokens)
        try:
            return _Live(tokens, self.matcher.after(token))
        except InputError as error:  # of this hypothesis alone: others may match
            return _Live(tokens, None, error)

    @property
    def matched(self) -> bool:
        return self.matcher is not None and self.matcher.finished

    @property
    def goes_on(self) -> bool:
        return self.stuck is None and not self.matched


def beam_search(
    model: Model,
    params,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    beams: int,
    *,
    context: int | None,
    vocab_size: int,
    end_of_text: Ends,
    sources: Sequence[Sequence[int]] | None = None,
    sampling: SamplingSpec = SamplingSpec(0.0),
    length_penalty: float = 1.0,
    chunk: int = CHUNK,
    constraint: Constraint | None = None,
) -> list[list[Hypothesis]]:
    """At most `beams` continuations of each prompt, the best score first.

    A row keeps its `beams` likeliest unfinished hypotheses. One of the `beams` likeliest continuations that ends is set
    aside with its score and not touched again; the row is done when `beams` are, or at `max_tokens`, where the
    unfinished ones join. One beam is greedy decoding. Rows do not depend on each other.

    Args:
        prompts, max_tokens, context, vocab_size, end_of_text, sources, chunk: as in `llm.generation.engine.complete`.
        beams: hypotheses of a row.
        sampling: its penalties and bans hold inside each hypothesis, and probabilities are those after them; nothing
            is drawn, so it must be greedy.
        length_penalty: exponent of the length; 0 compares plain probabilities, more prefers longer ones.
        constraint: what each new text has to match, as in `complete`. Probabilities stay those of all tokens, so that
            the best hypothesis is the likeliest of the texts that match.

    Raises:
        InputError: as `complete` does, or settings that do not fit.
    """
    if beams < 1:
        raise InputError(f"beams={beams}: must be at least 1")
    if sampling.temperature or sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        raise InputError(
            f"beams={beams}: beam search draws nothing, so temperature must be 0 and top_k, top_p and min_p be left out"
        )
    if not np.isfinite(length_penalty):
        raise InputError(f"length_penalty={length_penalty}: must be a finite number")
    if not prompts:
        return []
    rules = make_rules(sampling, vocab_size, end_of_text)
    laid, rows = lay_out(prompts, max_tokens, context, sources), len(prompts)
    limits, history = laid.limits, None
    if sampling.looks_back:
        history = begin_history(laid.tokens_BT, laid.lengths_B, laid.room)
    cache, last, source = prefill(model, params, laid, chunk)

    def scored(one: _Live, total: float, ended: str) -> Hypothesis:
        length = len(one.tokens) + (ended == "end" and not one.matched)
        return Hypothesis(one.tokens, total, total / max(length, 1) ** length_penalty, ended)

    live = [[_Live(matcher=None if constraint is None else constraint.begin())] for _ in prompts]
    running = np.array([limit > 0 and row[0].goes_on for limit, row in zip(limits, live)])
    finished = [
        [] if run else [scored(row[0], 0.0, "end" if limit and row[0].matched else "length")]
        for run, limit, row in zip(running, limits, live)
    ]
    state = None
    for n in range(max(limits)):
        drawn = np.full(rows * beams, n, np.int32)
        allowed = None if constraint is None else _allowed(live, beams, vocab_size)
        if state is None:
            state, cache, history = _first(model, rules, beams, params, cache, history, *last, drawn, source, allowed)
        else:
            real = jnp.asarray(np.repeat(running, beams).astype(np.int32))
            state, cache, history = _step(model, rules, params, cache, history, state[:3], real, drawn, allowed)
        totals, parents, words, ends, end_parents = (np.asarray(x).tolist() for x in state)
        for row in np.flatnonzero(running):
            before = live[row]
            finished[row] += [
                scored(before[parent], total, "end")
                for total, parent in zip(ends[row], end_parents[row])
                if total > -np.inf
            ]
            # A total of -inf is no hypothesis; those stand last, so numbers stay the device's.
            live[row] = [
                before[parent].grown(word)
                for total, parent, word in zip(totals[row], parents[row], words[row])
                if total > -np.inf
            ]
            finished[row] += [scored(one, total, "end") for one, total in zip(live[row], totals[row]) if one.matched]
            if n + 1 == limits[row]:
                finished[row] += [
                    scored(one, total, "length") for one, total in zip(live[row], totals[row]) if one.goes_on
                ]
            going = any(one.goes_on for one in live[row])
            if not going and not finished[row]:
                raise next(one.stuck for one in live[row] if one.stuck is not None)
            running[row] = n + 1 < limits[row] and len(finished[row]) < beams and going
        if not running.any():
            break
    return [sorted(row, key=lambda one: -one.score)[:beams] for row in finished]


def _allowed(live: list[list[_Live]], beams: int, vocab_size: int) -> jax.Array:
    """What may come after each hypothesis, allowed_RV: nothing after one that does not go on."""
    allowed_BKV = np.zeros((len(live), beams, vocab_size), bool)
    for row, hypotheses in enumerate(live):
        # At first one stands for all of the row's copies.
        for place, one in enumerate(hypotheses if len(hypotheses) > 1 else hypotheses * beams):
            if one.goes_on and one.matcher is not None:
                allowed_BKV[row, place] = one.matcher.allowed_V
    return jnp.asarray(allowed_BKV.reshape(-1, vocab_size))


def _select(model, rules, params, hidden_RD, totals_BK, drawn_R, history, allowed_RV):
    """What comes after each row's hypotheses, likeliest first.

    Returns:
        (totals_BK, parents_BK, tokens_BK) of the likeliest that do not end, and of the K likeliest that do
        (totals_BK, -inf where it does not; parents_BK). Parents are numbers within the row.
    """
    B, K = totals_BK.shape
    logits_RV = model.apply({"params": params}, hidden_RD, method="unembed")[:, : rules.vocab_size]
    adjusted_RV = adjust_logits(logits_RV, rules.sampling, history, drawn_R, rules.ends)
    vocab = adjusted_RV.shape[-1]
    scores_RV = jax.nn.log_softmax(adjusted_RV, axis=-1)
    if allowed_RV is not None:
        scores_RV = only_allowed(scores_RV, jax.nn.log_softmax(logits_RV, axis=-1), allowed_RV)
    totals_BKV = totals_BK[..., None] + scores_RV.reshape(B, K, vocab)
    is_end_V = jnp.zeros((vocab,), bool).at[jnp.array(rules.ends, jnp.int32)].set(True)
    best_BK, place_BK = jax.lax.top_k(totals_BKV.reshape(B, K * vocab), K)
    ends_BK = jnp.where(is_end_V[place_BK % vocab], best_BK, -jnp.inf)
    going_BKV = jnp.where(is_end_V, -jnp.inf, totals_BKV)
    live_BK, live_place_BK = jax.lax.top_k(going_BKV.reshape(B, K * vocab), K)
    return live_BK, live_place_BK // vocab, live_place_BK % vocab, ends_BK, place_BK // vocab


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first(model, rules, beams, params, cache, history, tokens_BT, real_B, drawn_R, source, allowed_RV):
    """Reads the last piece of the prompts, once each, and begins their hypotheses."""
    B = tokens_BT.shape[0]
    last_BD, cache = feed(model, params, cache, tokens_BT, real_B, source)
    rows_R = jnp.repeat(jnp.arange(B), beams)
    history = None if history is None else history.take(rows_R)
    # There is one hypothesis yet; copies of it would fill the beams with the same.
    totals_BK = jnp.where(jnp.arange(beams) == 0, 0.0, jnp.full((B, 1), -jnp.inf))
    state = _select(model, rules, params, last_BD[rows_R], totals_BK, drawn_R, history, allowed_RV)
    return state, take_rows(cache, rows_R), history


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _step(model, rules, params, cache, history, chosen, real_R, drawn_R, allowed_RV):
    """Feeds each hypothesis its newest token, to the cache of the hypothesis that it goes on from."""
    totals_BK, parents_BK, tokens_BK = chosen
    B, K = totals_BK.shape
    rows_R = (jnp.arange(B)[:, None] * K + parents_BK).reshape(-1)
    tokens_R = tokens_BK.reshape(-1)
    history = None if history is None else history.take(rows_R).append(tokens_R)
    last_RD, cache = feed(model, params, take_rows(cache, rows_R), tokens_R[:, None], real_R, {})
    return _select(model, rules, params, last_RD, totals_BK, drawn_R, history, allowed_RV), cache, history
