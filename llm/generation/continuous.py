"""Continuous batching: rows come and go while the batch runs on (Yu et al. 2022, Orca)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

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
    bucket,
    check_lengths,
    draw,
    feed,
    make_rules,
    padded,
    pieces,
    read_piece,
    read_sources,
)
from llm.generation.rows import put_row
from llm.generation.spec import SamplingSpec
from llm.models import Model


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, as a row of `llm.generation.engine.complete`.

    Attributes:
        source: what an encoder reads.
        constraint: what the new text has to match, over the batch's vocabulary.
    """

    prompt: Sequence[int]
    max_tokens: int
    seed: int = 0
    source: Sequence[int] | None = None
    constraint: Constraint | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that runs: its number, what it has drawn, and how far that has matched."""

    number: int
    request: Request
    completion: Completion
    matcher: Matcher | None


class ContinuousBatch:
    """A decoding batch of fixed size whose rows are requests of different ages.

    Each row has the tokens of `complete` alone with the request's seed, whatever else is in the batch. Programs are
    compiled for one decoding step, and for prompts of each bucket of lengths (powers of two, up to the piece in which
    longer ones are read) once, each with and without constraints; none later.
    """

    def __init__(
        self,
        model: Model,
        params,
        sampling: SamplingSpec,
        *,
        slots: int,
        room: int,
        vocab_size: int,
        end_of_text: Ends,
        source_room: int | None = None,
        chunk: int = CHUNK,
        log_probabilities: bool = False,
        on_token: Callable[[int, int], bool | None] = lambda number, token: None,
    ):
        """Makes an empty batch.

        Args:
            model, params, sampling, vocab_size, end_of_text, chunk, log_probabilities: as of `complete`.
            slots: rows that run at once.
            room: tokens of prompt and output that a row may have, at most the model's context.
            source_room: the same of sources; None where the model has no encoder.
            on_token: called with (the request's number, token); True ends the row after this token.

        Raises:
            InputError: no slot, no room, no chunk, or more room than the model's context.
        """
        context = model.spec.context
        if slots < 1 or room < 2 or (context is not None and room > context):
            raise InputError(
                f"slots={slots}, room={room}: expected at least 1 slot and 2 tokens, at most the context of {context}"
            )
        if chunk < 1:
            raise InputError(f"chunk={chunk}: must be at least 1")
        if model.reads_source != (source_room is not None):
            raise InputError(f"source_room={source_room}: a model with an encoder needs it, another has none")
        self._model, self._params, self._on_token = model, params, on_token
        self._rules = make_rules(sampling, vocab_size, end_of_text, log_probabilities)
        self._room, self._source_room, self._chunk = room, source_room, min(chunk, room)
        self._cache = self._empty(slots)
        empty = np.zeros((slots, 0), np.int32), np.zeros((slots,), np.int32)
        self._history = begin_history(*empty, room) if sampling.looks_back else None
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._rows: list[_Row | None] = [None] * slots
        self._tokens, self._seeds = np.zeros((slots, 1), np.int32), np.zeros((slots,), np.uint32)
        self._drawn = np.zeros((slots,), np.int32)
        self._count = 0

    def _empty(self, rows: int):
        return self._model.init_cache(rows, self._room, self._source_room or 0, self._chunk)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._waiting and all(row is None for row in self._rows)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number: 0, 1, ...

        Raises:
            InputError: it does not fit into the room, has a source where there is none or none where one is needed, or
                a constraint of another vocabulary.
        """
        check_lengths(len(request.prompt), request.max_tokens, self._room)
        if request.max_tokens < 1:
            raise InputError(f"max_tokens={request.max_tokens}: must be at least 1")
        if not 0 <= request.seed < 2**32:
            raise InputError(f"seed={request.seed}: must lie in 0..2^32-1")
        if (request.source is None) != (self._source_room is None):
            raise InputError("a model with an encoder reads a source with every prompt, another reads none")
        if request.source is not None and self._source_room is not None and len(request.source) > self._source_room:
            raise InputError(
                f"the source has {len(request.source)} tokens, the room is {self._source_room}: shorten it"
            )
        if request.constraint is not None and request.constraint.size != self._rules.vocab_size:
            raise InputError(
                f"the constraint's vocabulary has {request.constraint.size} ids, the batch's {self._rules.vocab_size}"
            )
        self._waiting.append((self._count, request))
        self._count += 1
        return self._count - 1

    def step(self) -> list[tuple[int, Completion]]:
        """Draws a token for each running row, after prompts have been read into free rows; returns who is done."""
        done = []
        for slot, row in enumerate(self._rows):
            while row is None and self._waiting:
                done += self._admit(slot, *self._waiting.popleft())
                row = self._rows[slot]  # free again where the first token was the last
        running = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not running:
            return done
        real = np.array([row is not None for row in self._rows], np.int32)
        matchers = [None if row is None else row.matcher for row in self._rows]
        tokens, scores, self._cache, self._history = _step(
            self._model, self._rules, self._params, self._cache, self._history, jnp.asarray(self._tokens),
            jnp.asarray(real), jnp.asarray(self._seeds), jnp.asarray(self._drawn), self._allowed(matchers),
        )  # fmt: skip
        for slot in running:
            done += self._take(slot, np.asarray(tokens), scores if scores is None else np.asarray(scores), slot)
        return done

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """The completions of all requests as they are done, by number."""
        for request in requests:
            self.submit(request)
        while not self.idle:
            yield from self.step()

    def _admit(self, slot: int, number: int, request: Request) -> list[tuple[int, Completion]]:
        matcher = None if request.constraint is None else request.constraint.begin()
        if matcher is not None and matcher.finished:  # only the empty text matches
            return [(number, Completion(ended="end"))]
        length = np.array([len(request.prompt)], np.int32)
        tokens, _ = padded([request.prompt], min(self._room, bucket(int(length[0]))))
        source = read_sources(None if request.source is None else [request.source], self._source_room)
        own = None
        if self._history is not None:
            own = begin_history(tokens, length, self._room)
        *before, last = pieces(tokens, length, self._chunk)
        cache = self._empty(1)
        for piece in before:
            cache, source = read_piece(self._model, self._params, cache, *piece, source), {}
        seed = np.uint32(request.seed)
        drawn, scores, self._cache, self._history = _admit(
            self._model, self._rules, self._params, self._cache, self._history, jnp.int32(slot), cache, *last,
            jnp.array([seed]), own, source, self._allowed([matcher]),
        )  # fmt: skip
        self._rows[slot] = _Row(number, request, Completion(), matcher)
        self._seeds[slot], self._drawn[slot] = seed, 0
        return self._take(slot, np.asarray(drawn), scores if scores is None else np.asarray(scores), 0)

    def _allowed(self, matchers: Sequence[Matcher | None]) -> jax.Array | None:
        """What may come next in each row, bool (rows, vocabulary); None where no row has a constraint."""
        if all(matcher is None for matcher in matchers):
            return None
        everything = np.ones(self._rules.vocab_size, bool)
        return jnp.asarray(np.stack([everything if m is None else m.allowed_V for m in matchers]))

    def _take(self, slot: int, tokens, scores, place: int) -> list[tuple[int, Completion]]:
        """Gives a row the token at a place; returns the row if that was its last."""
        row = self._rows[slot]
        assert row is not None
        completion = row.completion
        token = int(tokens[place])
        self._tokens[slot], self._drawn[slot] = token, self._drawn[slot] + 1
        ended = token in self._rules.ends
        if ended:
            completion.ended = "end"
        else:
            completion.tokens.append(token)
            if scores is not None:
                completion.log_probabilities.append(float(scores[place]))
            ended = len(completion.tokens) == row.request.max_tokens
            if self._on_token(row.number, token):
                ended, completion.ended = True, "stopped"
            elif row.matcher is not None:
                try:
                    row.matcher.advance(token)
                    if row.matcher.finished:
                        ended, completion.ended = True, "end"
                except InputError:  # of this row alone: the others go on
                    ended, completion.ended = True, "stuck"
        if not ended:
            return []
        self._rows[slot] = None
        return [(row.number, completion)]


def _keys(seeds_B):
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _admit(
    model, rules, params, cache, history, slot, own, tokens_1T, real_1, seeds_1, own_history, source, allowed_1V
):
    """Reads the last piece of a prompt and draws its first token; its cache and history take the place of a slot's."""
    last_1D, own = feed(model, params, own, tokens_1T, real_1, source)
    zero = jnp.zeros((1,), jnp.int32)
    token_1, score_1, own_history = draw(model, rules, params, last_1D, _keys(seeds_1), zero, own_history, allowed_1V)
    if history is not None:
        history = jax.tree.map(lambda x, y: x.at[slot].set(y[0]), history, own_history)
    return token_1, score_1, put_row(cache, slot, own), history


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _step(model, rules, params, cache, history, tokens_B1, real_B, seeds_B, drawn_B, allowed_BV):
    last_BD, cache = feed(model, params, cache, tokens_B1, real_B, {})
    token_B, score_B, history = draw(model, rules, params, last_BD, _keys(seeds_B), drawn_B, history, allowed_BV)
    return token_B, score_B, cache, history
