"""Speculative decoding: cheap guesses, checked many at a time (Leviathan et al. 2023, arXiv:2211.17192).

A guess d, made with probability q(d), is kept with probability min(1, p(d) / q(d)), p being the model's own
distribution; the first that is not kept is replaced by a draw from max(p - q, 0), normalised. What is written has
therefore exactly the distribution p, whatever the guesses are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import InputError
from llm.generation.constrained import Constraint, Matcher
from llm.generation.engine import (
    CHUNK,
    Completion,
    Ends,
    begin_history,
    feed,
    lay_out,
    make_rules,
    prefill,
    read_piece,
    row_keys,
)
from llm.generation.penalties import History, adjust_logits, only_allowed
from llm.generation.sampling import distribution
from llm.generation.spec import SamplingSpec
from llm.models import Model
from llm.models.rnn import RecurrentState


class Draft(NamedTuple):
    """A smaller model of the same vocabulary that guesses."""

    model: Model
    params: Any


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Guesses that the text goes on as it did after the last place where its newest `ngram` tokens stand."""

    ngram: int = 2


@dataclasses.dataclass
class Account:
    """Guesses that were checked and kept, and calls of the model."""

    guessed: int = 0
    kept: int = 0
    calls: int = 0


def speculate(
    model: Model,
    params,
    guesser: Draft | Lookup,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    sampling: SamplingSpec,
    *,
    context: int | None,
    vocab_size: int,
    end_of_text: Ends,
    sources: Sequence[Sequence[int]] | None = None,
    seed: int | Sequence[int] = 0,
    ahead: int = 4,
    chunk: int = CHUNK,
    account: Account | None = None,
    constraint: Constraint | None = None,
    on_token: Callable[[int, int], bool | None] = lambda row, token: None,
) -> list[Completion]:
    """Continues prompts as `llm.generation.engine.complete` does, with fewer calls of the model.

    At temperature 0 the tokens are those of `complete`, up to ties within rounding; else they have its distribution,
    but not its draws. Rows do not depend on each other.

    Args:
        guesser: a draft model, which reads what the model reads, or a look-up in the text so far.
        ahead: guesses of a round.
        account: is added to, where given.
        constraint: as in `complete`. A draft guesses without it, and what does not match is not kept.
        The others: as in `complete`.

    Raises:
        InputError: as `complete` does, or settings of the guesses that do not fit.
    """
    if ahead < 1:
        raise InputError(f"ahead={ahead}: guess at least 1 token a round")
    if isinstance(guesser, Lookup) and guesser.ngram < 1:
        raise InputError(f"ngram={guesser.ngram}: look up at least 1 token")
    if not prompts:
        return []
    rows, account = len(prompts), account or Account()
    rules = make_rules(sampling, vocab_size, end_of_text)
    limits, lengths, tokens, room, _ = laid = lay_out(prompts, max_tokens, context, sources)
    if isinstance(guesser, Draft):
        _check_draft(model, guesser.model, vocab_size, max(lengths + limits))
    parts = [(model, params), *([guesser] if isinstance(guesser, Draft) else [])]
    caches = tuple(_all_but_the_last(part, weights, laid, chunk, ahead + 1) for part, weights in parts)
    # Room for the guesses that reach beyond the last token.
    history = begin_history(tokens, lengths, room + ahead)
    keys, guess = row_keys(seed, rows), (guesser.model if isinstance(guesser, Draft) else guesser)
    draft_params = guesser.params if isinstance(guesser, Draft) else None
    completions = [Completion() for _ in prompts]
    running = np.array([limit > 0 for limit in limits])
    matchers = [None if constraint is None else constraint.begin() for _ in prompts]
    for row, matcher in enumerate(matchers):
        if running[row] and matcher is not None and matcher.finished:  # only the empty text matches
            running[row], completions[row].ended = False, "end"
    while running.any():
        guesses = _guess(guess, rules, ahead, draft_params, caches[-1], history, keys)
        allowed = None
        if constraint is not None:
            follow = zip(matchers, running, np.asarray(guesses[0]).tolist())
            allowed = jnp.asarray(np.stack([_allowed(m if run else None, row, vocab_size) for m, run, row in follow]))
        found, counts, caches, history = _check(
            model, guess, rules, params, draft_params, caches, history, keys, jnp.asarray(running), *guesses, allowed
        )
        found, counts = np.asarray(found).tolist(), np.asarray(counts).tolist()
        account.calls += 1
        for row in np.flatnonzero(running):
            account.guessed, account.kept = account.guessed + ahead, account.kept + counts[row] - 1
            for token in found[row][: counts[row]]:
                if token in rules.ends:
                    running[row], completions[row].ended = False, "end"
                    break
                completions[row].tokens.append(token)
                if on_token(int(row), token):
                    running[row], completions[row].ended = False, "stopped"
                    break
                matcher = matchers[row]
                if matcher is not None:
                    matcher.advance(token)
                    if matcher.finished:
                        running[row], completions[row].ended = False, "end"
                        break
                if len(completions[row].tokens) == limits[row]:
                    running[row] = False
                    break
    return completions


def _check_draft(model: Model, draft: Model, vocab_size: int, longest: int) -> None:
    if draft.spec.vocab_size < vocab_size:
        raise InputError(f"the draft's vocabulary has {draft.spec.vocab_size} ids, the model's {vocab_size}")
    if draft.reads_source != model.reads_source:
        raise InputError("the draft must read a source where the model does, and only there")
    if draft.spec.context is not None and draft.spec.context < longest:
        raise InputError(f"the draft's context is {draft.spec.context}: {longest} tokens do not fit")


def _all_but_the_last(model: Model, params, laid, chunk: int, ahead: int):
    """The cache after all of each prompt but its last token."""
    cache, last, source = prefill(model, params, laid._replace(lengths_B=laid.lengths_B - 1), chunk, ahead)
    return read_piece(model, params, cache, *last, source)


def _allowed(matcher: Matcher | None, guesses: list[int], vocab_size: int) -> np.ndarray:
    """What may come before and after each guess, allowed_TV; after one that cannot be kept, or ends a match, anything.

    Args:
        matcher: None where the row has ended.
    """
    allowed_TV = np.ones((len(guesses) + 1, vocab_size), bool)
    for place, token in enumerate([*guesses, None]):
        if matcher is None or matcher.finished:
            break
        allowed_TV[place] = matcher.allowed_V
        if token is None or not matcher.allows(token):
            break
        try:
            matcher = matcher.after(token)
        except InputError:  # raised again if it is kept
            break
    return allowed_TV


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _guess(guess, rules, ahead, params, cache, history: History, keys_B):
    """(guesses_BA, q_BAV: by which probabilities they were drawn, None where all of it is theirs)."""
    if isinstance(guess, Lookup):
        return _looked_up(history, guess.ngram, ahead), None
    newest_B = history.tokens_BS[jnp.arange(history.tokens_BS.shape[0]), history.lengths_B - 1]
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, history.lengths_B)
    return _drafted(guess, rules, ahead, params, cache, history, newest_B, keys_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _check(
    model, guess, rules, params, draft_params, caches, history: History, keys_B, running_B, guesses_BA, q_BAV,
    allowed_BTV,
):  # fmt: skip
    """Keeps of the guesses what it may.

    Returns:
        (tokens_BT, counts_B: how many of them are written, the caches after all but the newest token, the history).
    """
    rows, ahead = jnp.arange(history.tokens_BS.shape[0]), guesses_BA.shape[1]
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, history.lengths_B)
    newest_B = history.tokens_BS[rows, history.lengths_B - 1]
    if q_BAV is None:
        q_BAV = jax.nn.one_hot(guesses_BA, rules.vocab_size)
    fed_BT = jnp.concatenate([newest_B[:, None], guesses_BA], axis=1)
    # Guesses beyond the room, which no row needs, have no place in a cache.
    ends_B = jnp.where(running_B, history.tokens_BS.shape[1] - 1 - ahead, 0)
    real_BT = history.lengths_B[:, None] - 1 + jnp.arange(ahead + 1) < ends_B[:, None]
    batch = {"tokens": fed_BT, "segments": real_BT.astype(jnp.int32)}
    output = model.apply({"params": params}, batch, cache=caches[0])
    p, after = [], history
    for place in range(ahead + 1):
        allowed_BV = None if allowed_BTV is None else allowed_BTV[:, place]
        p.append(_probabilities(model, rules, params, output.hidden_BTD[:, place], after, allowed_BV))
        after = after if place == ahead else after.append(guesses_BA[:, place])
    p_BTV = jnp.stack(p, axis=1)

    accept_B, draw_B = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, 2 * ahead + n) for n in (0, 1))
    chance_BA = jax.vmap(lambda key: jax.random.uniform(key, (ahead,)))(accept_B)
    p_BA, q_BA = (jnp.take_along_axis(x, guesses_BA[..., None], axis=-1)[..., 0] for x in (p_BTV[:, :ahead], q_BAV))
    # u < p / q without the division: what p cannot give is never kept, u being below 1 the certain always is.
    kept_B = jnp.cumprod(chance_BA * q_BA < p_BA, axis=1).sum(axis=1)
    # After the last guess nothing has been guessed: q is zero there, and the draw is from p.
    q_BTV = jnp.concatenate([q_BAV, jnp.zeros_like(p_BTV[:, :1])], axis=1)
    rest_BV = jnp.maximum(p_BTV - q_BTV, 0)[rows, kept_B]
    # p and q may be equal but for rounding, where a guess was refused all the same: then p is what is left.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BTV[rows, kept_B])
    last_B = jax.vmap(jax.random.categorical)(draw_B, jnp.log(rest_BV)).astype(jnp.int32)

    places = jnp.arange(ahead + 1)
    guesses_BT = jnp.pad(guesses_BA, ((0, 0), (0, 1)))
    written_BT = jnp.where(places < kept_B[:, None], guesses_BT, last_B[:, None])
    counts_B = jnp.where(running_B, kept_B + 1, 0)
    tokens_BS = history.tokens_BS.at[rows[:, None], history.lengths_B[:, None] + places].set(written_BT, mode="drop")
    history = dataclasses.replace(history, tokens_BS=tokens_BS, lengths_B=history.lengths_B + counts_B)
    fed = fed_BT, counts_B
    caches = (
        _rewound(model, params, caches[0], output.cache, *fed),
        *(_rewound(guess, draft_params, cache, None, *fed) for cache in caches[1:]),
    )
    return written_BT, counts_B, caches, history


def _probabilities(model, rules, params, hidden_BD, history: History, allowed_BV=None):
    """What `complete` would draw the next token from, after this history."""
    logits_BV = model.apply({"params": params}, hidden_BD, method="unembed")[:, : rules.vocab_size]
    drawn_B = history.lengths_B - history.prompts_B
    adjusted_BV = adjust_logits(logits_BV, rules.sampling, history, drawn_B, rules.ends)
    return distribution(only_allowed(adjusted_BV, logits_BV, allowed_BV), rules.sampling)


def _drafted(model, rules, ahead: int, params, cache, history: History, newest_B, keys_B):
    """(guesses_BA, q_BAV) of a draft model; its cache is not kept."""
    guesses, q = [], []
    for place in range(ahead):
        last_BD, cache = feed(model, params, cache, newest_B[:, None], jnp.ones_like(newest_B), {})
        q.append(_probabilities(model, rules, params, last_BD, history))
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, place)
        newest_B = jax.vmap(jax.random.categorical)(keys, jnp.log(q[-1])).astype(jnp.int32)
        guesses.append(newest_B)
        history = history.append(newest_B)
    return jnp.stack(guesses, axis=1), jnp.stack(q, axis=1)


def _looked_up(history: History, ngram: int, ahead: int) -> jax.Array:
    """guesses_BA: what followed the newest tokens at their last place before; any guess will do where there is none."""
    tokens_BS, lengths_B = history.tokens_BS, history.lengths_B
    rows, places = jnp.arange(tokens_BS.shape[0])[:, None], jnp.arange(tokens_BS.shape[1])
    # A place is that of a sequence's last token, before the newest one.
    match_BS = (places >= ngram - 1) & (places < lengths_B[:, None] - 1)
    for back in range(ngram):
        newest_B1 = tokens_BS[rows, jnp.maximum(lengths_B[:, None] - 1 - back, 0)]
        match_BS &= jnp.roll(tokens_BS, back, axis=1) == newest_B1
    last_B = jnp.where(match_BS, places, 0).max(axis=1)
    # Text that has not been written yet is guessed to repeat what lies between.
    period_B = jnp.maximum(lengths_B - 1 - last_B, 1)
    return tokens_BS[rows, last_B[:, None] + 1 + jnp.arange(ahead) % period_B[:, None]]


def _rewound(model, params, before, after, tokens_BT, real_B):
    """The cache after the first real_B of these tokens.

    Args:
        before: the cache before them.
        after: after all of them, None where it is not known.
    """
    if isinstance(before, RecurrentState) or after is None:  # a state has no way back
        return feed(model, params, before, tokens_BT, real_B, {})[1]
    return dataclasses.replace(after, lengths_B=before.lengths_B + real_B)
