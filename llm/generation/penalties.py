"""What changes the logits because of the tokens so far: penalties, bans, and the bias of single tokens."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from llm.generation.spec import SamplingSpec


@flax.struct.dataclass
class History:
    """The tokens of each row so far: tokens_BS, of which lengths_B are real; the first prompts_B are the prompt."""

    tokens_BS: jax.Array
    prompts_B: jax.Array
    lengths_B: jax.Array

    def append(self, tokens_B: jax.Array) -> "History":
        """With one more token in each row; what finds no room is dropped."""
        rows = jnp.arange(tokens_B.shape[0])
        tokens_BS = self.tokens_BS.at[rows, self.lengths_B].set(tokens_B, mode="drop")
        return dataclasses.replace(self, tokens_BS=tokens_BS, lengths_B=self.lengths_B + 1)

    def take(self, rows_R: jax.Array) -> "History":
        """The history of these rows."""
        return jax.tree.map(lambda x: x[rows_R], self)


def adjust_logits(
    logits_BV: jax.Array,
    spec: SamplingSpec,
    history: History | None,
    drawn_B: jax.Array,
    ends: tuple[int, ...],
) -> jax.Array:
    """The logits after all that acts before temperature, in the order that `SamplingSpec` states, in float32.

    Tokens that end a row are neither penalised nor banned by the history: the end of text that opens a row is no text.
    A ban that would leave a row nothing is lifted.

    Args:
        logits_BV: the model's.
        spec: what acts; what is off costs nothing.
        history: needed where `spec.looks_back`.
        drawn_B: tokens that each row has drawn so far.
        ends: ids that end a row.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    vocab, given_BV, at_ends = logits_BV.shape[-1], logits_BV, jnp.array(ends, jnp.int32)
    if spec.looks_back:
        assert history is not None
        logits_BV = _penalised(logits_BV, spec, history)
        logits_BV = logits_BV.at[:, at_ends].set(given_BV[:, at_ends])
    if spec.logit_bias:
        ids, values = zip(*spec.logit_bias)
        logits_BV = logits_BV.at[:, jnp.array(ids)].add(jnp.array(values, jnp.float32))
    if spec.min_tokens and ends:
        early_BV = (drawn_B < spec.min_tokens)[:, None] & jnp.zeros((vocab,), bool).at[at_ends].set(True)
        logits_BV = jnp.where(early_BV, -jnp.inf, logits_BV)
    if spec.no_repeat_ngram:
        assert history is not None
        banned_BV = _repeating(history, spec.no_repeat_ngram, vocab).at[:, at_ends].set(False)
        left_BV = jnp.where(banned_BV, -jnp.inf, logits_BV)
        logits_BV = jnp.where((left_BV > -jnp.inf).any(-1, keepdims=True), left_BV, logits_BV)
    return logits_BV


def only_allowed(adjusted_BV: jax.Array, logits_BV: jax.Array, allowed_BV: jax.Array | None) -> jax.Array:
    """The adjusted logits, -inf where a constraint does not allow a token; None allows all.

    Where bans have left none of those that are allowed, by the model's own logits_BV.
    """
    if allowed_BV is None:
        return adjusted_BV
    left_BV = allowed_BV & (adjusted_BV > -jnp.inf)
    return jnp.where(allowed_BV, jnp.where(left_BV.any(-1, keepdims=True), adjusted_BV, logits_BV), -jnp.inf)


def _penalised(logits_BV: jax.Array, spec: SamplingSpec, history: History) -> jax.Array:
    vocab, places = logits_BV.shape[-1], jnp.arange(history.tokens_BS.shape[1])
    real_BS = places < history.lengths_B[:, None]
    if spec.repetition_penalty != 1:
        penalty = spec.repetition_penalty
        seen_BV = _counts(history.tokens_BS, real_BS, vocab) > 0
        weaker_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, weaker_BV, logits_BV)
    if spec.presence_penalty or spec.frequency_penalty:
        output_BS = real_BS & (places >= history.prompts_B[:, None])
        counts_BV = _counts(history.tokens_BS, output_BS, vocab)
        logits_BV -= spec.presence_penalty * (counts_BV > 0) + spec.frequency_penalty * counts_BV
    return logits_BV


def _counts(tokens_BS: jax.Array, counted_BS: jax.Array, vocab: int) -> jax.Array:
    rows = jnp.arange(tokens_BS.shape[0])[:, None]
    zeros_BV = jnp.zeros((tokens_BS.shape[0], vocab), jnp.int32)
    return zeros_BV.at[rows, tokens_BS].add(counted_BS.astype(jnp.int32), mode="drop")


def _repeating(history: History, n: int, vocab: int) -> jax.Array:
    """Which tokens would complete a sequence of n that stands in the row already."""
    tokens_BS, lengths_B = history.tokens_BS, history.lengths_B
    rows, starts = jnp.arange(tokens_BS.shape[0])[:, None], max(tokens_BS.shape[1] - n + 1, 0)
    # A place is that of a sequence's last token; the row's own last n - 1 tokens are compared with those before it.
    match_BS = jnp.arange(starts) + n - 1 < lengths_B[:, None]
    for back in range(1, n):
        ending_B1 = tokens_BS[rows, jnp.maximum(lengths_B[:, None] - back, 0)]
        match_BS &= tokens_BS[:, n - 1 - back : n - 1 - back + starts] == ending_B1
    return jnp.zeros((tokens_BS.shape[0], vocab), bool).at[rows, tokens_BS[:, n - 1 :]].max(match_BS, mode="drop")
