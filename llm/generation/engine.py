"""The decoding loop: prefill the prompts, then one token a row and step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import InputError
from llm.generation.constrained import Constraint
from llm.generation.penalties import History, adjust_logits, only_allowed
from llm.generation.sampling import sample
from llm.generation.spec import SamplingSpec
from llm.models import Model

Ends = int | None | Sequence[int]
# The most tokens of a prompt that are read at once: what a prefill computes, and a window's cache keeps, grows with it.
CHUNK = 512


@dataclasses.dataclass
class Completion:
    """What one row has drawn.

    Attributes:
        tokens: without the one that ended the row.
        log_probabilities: of each token, where asked for: by the model's own distribution over the vocabulary, before
            penalties, bans, temperature and filters.
        ended: "end" by an end of text, or by a match that nothing can be added to; "stopped" by `on_token`; "length" by
            the limit, which may cut a match short; of a continuous batch also "stuck": nothing can go on with what was
            begun of a match.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    ended: str = "length"


class Rules(NamedTuple):
    """What is fixed when a step is compiled: how tokens are drawn and which end a row, and whether they are scored."""

    sampling: SamplingSpec
    vocab_size: int
    ends: tuple[int, ...] = ()
    scored: bool = False


def generate(model: Model, params, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int],
             sampling: SamplingSpec, **how) -> list[list[int]]:  # fmt: skip
    """The tokens of `complete`, which has the same arguments."""
    return [row.tokens for row in complete(model, params, prompts, max_tokens, sampling, **how)]


def complete(
    model: Model,
    params,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    sampling: SamplingSpec,
    *,
    context: int | None,
    vocab_size: int,
    end_of_text: Ends,
    sources: Sequence[Sequence[int]] | None = None,
    seed: int | Sequence[int] = 0,
    use_cache: bool = True,
    chunk: int = CHUNK,
    log_probabilities: bool = False,
    constraint: Constraint | None = None,
    on_token: Callable[[int, int], bool | None] = lambda row, token: None,
) -> list[Completion]:
    """Continues each prompt by at most `max_tokens` tokens, up to the end of text, which is not returned.

    A row's tokens do not depend on the other rows: prompts are padded on the right, the padding is masked, and row r
    draws token n with the key (seed, r, n).

    Args:
        prompts: token ids, at least one each; what opens the decoder's row where there are sources.
        max_tokens: of all rows, or of each.
        context: the model's longest sequence; None has no limit.
        vocab_size: ids that the tokenizer knows; a larger table's other rows are never drawn.
        end_of_text: the id, or the ids, that end a row; None never does.
        sources: token ids that an encoder reads, one for each prompt; an empty one says nothing. None where the model
            has no encoder.
        seed: of all rows, or of each: a row with its own seed s draws as the first row of a call with the seed s.
        chunk: the most tokens of a prompt that are read at once; the tokens do not depend on it.
        use_cache: False computes every step from all tokens so far; slower, for comparison.
        log_probabilities: whether they are computed.
        constraint: what each row's new text has to match. Nothing else is drawn: bans by bias, n-grams and the minimum
            of tokens do not hold where they would leave no way on. A row ends when its match cannot go on; one that
            the limit cuts is a match's beginning.
        on_token: called with (row, token) as each token is drawn; True ends the row after this token.

    Raises:
        InputError: an empty prompt, one that leaves no room for its `max_tokens` in the context, or a biased id that
            the vocabulary lacks, or a constraint that the vocabulary's tokens cannot follow.
    """
    if not prompts:
        return []
    rules = make_rules(sampling, vocab_size, end_of_text, log_probabilities)
    limits, lengths, tokens, room, source = laid = lay_out(prompts, max_tokens, context, sources)
    rows, keys = len(prompts), row_keys(seed, len(prompts))
    step, new, read = _full_step, (jnp.asarray(tokens), jnp.asarray(lengths)), source
    if use_cache:
        step = _cached_step
        carried, new, read = prefill(model, params, laid, chunk)
    else:
        carried = jnp.asarray(np.pad(tokens, ((0, 0), (0, room - tokens.shape[1]))))
    history = begin_history(tokens, lengths, room) if sampling.looks_back else None
    completions = [Completion() for _ in prompts]
    running = np.array([limit > 0 for limit in limits])
    matchers = [] if constraint is None else [constraint.begin() for _ in prompts]
    for row, matcher in enumerate(matchers):
        if running[row] and matcher.finished:  # only the empty text matches
            running[row], completions[row].ended = False, "end"
    for n in range(max(limits)):
        if not running.any():
            break
        seen = jnp.asarray(lengths + n)
        drawn_so_far = np.full(rows, n, np.int32)
        allowed = jnp.asarray(np.stack([matcher.allowed_V for matcher in matchers])) if matchers else None
        drawn, scores, carried, history = step(
            model, rules, params, carried, *new, seen, keys, drawn_so_far, history, read, allowed
        )
        found = np.asarray(drawn).tolist(), None if scores is None else np.asarray(scores).tolist()
        for row in np.flatnonzero(running):
            token = found[0][row]
            if token in rules.ends:
                running[row], completions[row].ended = False, "end"
                continue
            completions[row].tokens.append(token)
            if found[1] is not None:
                completions[row].log_probabilities.append(found[1][row])
            if on_token(int(row), token):
                running[row], completions[row].ended = False, "stopped"
                continue
            if matchers:
                matchers[row].advance(token)
            if matchers and matchers[row].finished:
                running[row], completions[row].ended = False, "end"
            elif n + 1 == limits[row]:
                running[row] = False
        # Rows that have ended are fed padding, which no cache counts; a cache has kept the source.
        new, read = (drawn[:, None], jnp.asarray(running.astype(np.int32))), {} if use_cache else source
    return completions


class Layout(NamedTuple):
    """Prompts as arrays: limits of new tokens, lengths_B, tokens_BT, the room that rows need, and the source's keys."""

    limits: list[int]
    lengths_B: np.ndarray
    tokens_BT: np.ndarray
    room: int
    source: dict[str, jax.Array]


def lay_out(prompts, max_tokens: int | Sequence[int], context: int | None, sources) -> Layout:
    """The arrays of a call, in one shape for prompts of similar length, so that they share a compilation.

    Raises:
        InputError: as `complete` does.
    """
    limits = per_row("max_tokens", max_tokens, len(prompts))
    for prompt, limit in zip(prompts, limits):
        check_lengths(len(prompt), limit, context)
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    # The last token drawn is never fed.
    needed = max(len(prompt) + max(limit - 1, 0) for prompt, limit in zip(prompts, limits))
    room = bucket(needed) if context is None else min(bucket(needed), context)
    tokens_BT, _ = padded(prompts, min(room, bucket(int(lengths_B.max()))))
    return Layout(limits, lengths_B, tokens_BT, room, read_sources(sources))


def pieces(tokens_BT: np.ndarray, lengths_B: np.ndarray, chunk: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The rows' tokens in pieces, (tokens_BC, how many are real in each row), of at most `chunk` tokens.

    All pieces are of one shape. A shorter row begins in a later one, so that each row's last token is in the last.

    Raises:
        InputError: `chunk` is not positive.
    """
    if chunk < 1:
        raise InputError(f"chunk={chunk}: must be at least 1")
    size = min(chunk, tokens_BT.shape[1])
    count = max(1, -(-int(lengths_B.max()) // size))
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, size)))
    done_B = np.zeros_like(lengths_B)
    for left in range(count, 0, -1):
        # What remains after this piece fills whole ones.
        real_B = np.maximum(lengths_B - done_B - (left - 1) * size, 0)
        tokens_BC = np.take_along_axis(tokens_BT, done_B[:, None] + np.arange(size), axis=1)
        yield jnp.asarray(tokens_BC), jnp.asarray(real_B)
        done_B = done_B + real_B


def prefill(model: Model, params, laid: "Layout", chunk: int, ahead: int = 0):
    """Reads all but the last piece of the prompts.

    Args:
        laid: the prompts.
        chunk: as of `pieces`.
        ahead: tokens that later calls add to a row at once, where they are more.

    Returns:
        (the cache, the last piece, what a batch has to have of the source with it).
    """
    source = laid.source
    first, *rest = pieces(laid.tokens_BT, laid.lengths_B, chunk)
    width = source["source_tokens"].shape[1] if source else 0
    cache = model.init_cache(len(laid.limits), laid.room, width, max(first[0].shape[1], ahead))
    last = first
    for piece in rest:
        cache, source, last = read_piece(model, params, cache, *last, source), {}, piece
    return cache, last, source


def make_rules(sampling: SamplingSpec, vocab_size: int, end_of_text: Ends, scored: bool = False) -> Rules:
    """The rules of a call; raises InputError where a biased id is no token."""
    for token, _ in sampling.logit_bias:
        if token >= vocab_size:
            raise InputError(f"logit_bias names the id {token}: the vocabulary has {vocab_size}")
    ends = () if end_of_text is None else (end_of_text,) if isinstance(end_of_text, int) else tuple(end_of_text)
    return Rules(sampling, vocab_size, tuple(sorted({int(end) for end in ends})), scored)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """The key of each row, keys_B, by one seed for all or one each."""
    if isinstance(seed, int):
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))
    seeds = np.array(per_row("seed", seed, rows), np.uint32)
    return jax.vmap(lambda own: jax.random.fold_in(jax.random.key(own), 0))(jnp.asarray(seeds))


def per_row(name: str, value: int | Sequence[int], rows: int) -> list[int]:
    """A value for each row; raises ValueError where their number is another."""
    values = [value] * rows if isinstance(value, int) else list(value)
    if len(values) != rows:
        raise ValueError(f"{name} has {len(values)} values for {rows} prompts")
    return values


def begin_history(tokens_BT: np.ndarray, lengths_B: np.ndarray, room: int) -> History:
    """The history of rows that have their prompts alone, with space for `room` tokens and the last one drawn."""
    tokens_BS = np.pad(tokens_BT, ((0, 0), (0, room + 1 - tokens_BT.shape[1])))
    return History(jnp.array(tokens_BS), jnp.array(lengths_B), jnp.array(lengths_B))  # copies: steps take them over


def read_sources(sources: Sequence[Sequence[int]] | None, width: int | None = None) -> dict[str, jax.Array]:
    """What a batch has of the sources; padded to `width`, or to a bucket."""
    if sources is None:
        return {}
    ids, real = padded(sources, bucket(max(map(len, sources))) if width is None else width)
    return {"source_tokens": jnp.asarray(ids), "source_segments": jnp.asarray(real)}


def bucket(length: int) -> int:
    """The next power of two, at least 8."""
    return 1 << max(3, (max(length, 1) - 1).bit_length())


def padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right to (rows, width), int32, and 1 where they are real."""
    tokens = np.zeros((len(rows), width), np.int32)
    real = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        real[number, : len(row)] = 1
    return tokens, real


def check_lengths(prompt: int, max_tokens: int, context: int | None) -> None:
    """Raises InputError when a prompt of so many tokens cannot be continued by `max_tokens` within the context."""
    if prompt == 0:
        raise InputError("the prompt is empty: give at least one token")
    if context is None:
        return
    if prompt >= context:
        raise InputError(f"the prompt has {prompt} tokens, the model's context is {context}: shorten the prompt")
    if prompt + max_tokens > context:
        raise InputError(
            f"the prompt's {prompt} tokens and {max_tokens} new ones exceed the model's context of {context}: "
            f"ask for at most {context - prompt}"
        )


def draw(model: Model, rules: Rules, params, hidden_BD, keys_B, drawn_B, history: History | None, allowed_BV=None):
    """(token_B, log-probabilities or None, the history with the token) of rows that have drawn drawn_B so far.

    Of `allowed_BV`, bool, alone, where it is given.
    """
    logits_BV = model.apply({"params": params}, hidden_BD, method="unembed")[:, : rules.vocab_size]
    adjusted_BV = adjust_logits(logits_BV, rules.sampling, history, drawn_B, rules.ends)
    adjusted_BV = only_allowed(adjusted_BV, logits_BV, allowed_BV)
    token_B = sample(jax.vmap(jax.random.fold_in)(keys_B, drawn_B), adjusted_BV, rules.sampling)
    scores_B = None
    if rules.scored:
        scores_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, axis=-1), token_B[:, None], axis=-1)[:, 0]
    return token_B, scores_B, None if history is None else history.append(token_B)


def feed(model: Model, params, cache, tokens_BT, real_B, source: dict[str, jax.Array]):
    """(the hidden state of each row's last real token, the cache) after tokens_BT, of which real_B are real."""
    segments_BT = (jnp.arange(tokens_BT.shape[1]) < real_B[:, None]).astype(jnp.int32)
    output = model.apply({"params": params}, {"tokens": tokens_BT, "segments": segments_BT, **source}, cache=cache)
    return output.hidden_BTD[jnp.arange(tokens_BT.shape[0]), jnp.maximum(real_B - 1, 0)], output.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_piece(model: Model, params, cache, tokens_BT, real_B, source: dict[str, jax.Array]):
    """The cache after tokens_BT, of which real_B are real."""
    return feed(model, params, cache, tokens_BT, real_B, source)[1]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 9))
def _cached_step(model, rules, params, cache, tokens_BT, real_B, seen_B, keys_B, drawn_B, history, source, allowed_BV):
    """Feeds tokens_BT, of which real_B are real, to the cache and draws the token after the last real one."""
    del seen_B  # the cache knows
    last_BD, cache = feed(model, params, cache, tokens_BT, real_B, source)
    token_B, scores_B, history = draw(model, rules, params, last_BD, keys_B, drawn_B, history, allowed_BV)
    return token_B, scores_B, cache, history


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 9))
def _full_step(model, rules, params, all_BT, tokens_BT, real_B, seen_B, keys_B, drawn_B, history, source, allowed_BV):
    """As `_cached_step`, but `all_BT` holds every row's tokens so far and the model reads all of them."""
    rows = jnp.arange(all_BT.shape[0])
    # The newest tokens end at seen_B; writing a prompt again at its own place changes nothing.
    places_BT = (seen_B - jnp.maximum(real_B, 1))[:, None] + jnp.arange(tokens_BT.shape[1])
    all_BT = all_BT.at[rows[:, None], places_BT].set(tokens_BT, mode="drop")
    segments_BT = (jnp.arange(all_BT.shape[1]) < seen_B[:, None]).astype(jnp.int32)
    output = model.apply({"params": params}, {"tokens": all_BT, "segments": segments_BT, **source})
    last_BD = output.hidden_BTD[rows, seen_B - 1]
    token_B, scores_B, history = draw(model, rules, params, last_BD, keys_B, drawn_B, history, allowed_BV)
    return token_B, scores_B, all_BT, history
