"""The decoding loop: prefill the prompts, then one token a row and step."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import InputError
from llm.generation.sampling import sample
from llm.generation.spec import SamplingSpec
from llm.models import Model


def generate(
    model: Model,
    params,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: SamplingSpec,
    *,
    context: int | None,
    vocab_size: int,
    end_of_text: int | None,
    sources: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """Continues each prompt by at most `max_tokens` tokens, up to the end of text, which is not returned.

    A row's tokens do not depend on the other rows: prompts are padded on the right, the padding is masked, and row r
    draws token n with the key (seed, r, n).

    Args:
        prompts: token ids, at least one each; what opens the decoder's row where there are sources.
        context: the model's longest sequence; None has no limit.
        vocab_size: ids that the tokenizer knows; a larger table's other rows are never drawn.
        end_of_text: the id that ends a row; None never does.
        sources: token ids that an encoder reads, one for each prompt; an empty one says nothing. None where the model
            has no encoder.
        use_cache: False computes every step from all tokens so far; slower, for comparison.
        on_token: called with (row, token) as each token is drawn.

    Raises:
        InputError: an empty prompt, or one that leaves no room for `max_tokens` in the context.
    """
    if not prompts:
        return []
    for prompt in prompts:
        check_lengths(len(prompt), max_tokens, context)
    step = _cached_step if use_cache else _full_step
    lengths = np.array([len(p) for p in prompts], np.int32)
    rows = len(prompts)
    keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(jnp.arange(rows))

    # One shape for prompts of similar length, so that they share a compilation.
    longest = int(lengths.max())
    # The last token drawn is never fed.
    room = _bucket(longest + max_tokens - 1) if context is None else context
    width = min(room, _bucket(longest))
    tokens, _ = _padded(prompts, width)
    source: dict[str, jax.Array] = {}
    if sources is not None:
        ids, real = _padded(sources, _bucket(max(map(len, sources))))
        source = {"source_tokens": jnp.asarray(ids), "source_segments": jnp.asarray(real)}
    if use_cache:
        source_length = source["source_tokens"].shape[1] if source else 0
        carried = model.init_cache(rows, room, source_length)
    else:
        carried = jnp.asarray(np.pad(tokens, ((0, 0), (0, room - width))))
    new = jnp.asarray(tokens), jnp.asarray(lengths)
    produced: list[list[int]] = [[] for _ in prompts]
    running = np.ones(rows, bool)
    for n in range(max_tokens):
        seen = jnp.asarray(lengths + n)
        # A cache has kept the source after the first step.
        read = source if n == 0 or not use_cache else {}
        drawn, carried = step(model, sampling, vocab_size, params, carried, *new, seen, keys, n, read)
        for row, token in enumerate(np.asarray(drawn).tolist()):
            if running[row] and token == end_of_text:
                running[row] = False
            if running[row]:
                produced[row].append(token)
                on_token(row, token)
        if not running.any():
            break
        new = drawn[:, None], jnp.ones((rows,), jnp.int32)
    return produced


def _bucket(length: int) -> int:
    """The next power of two, at least 8."""
    return 1 << max(3, (max(length, 1) - 1).bit_length())


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
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


def _draw(model, sampling, vocab_size, params, hidden_BD, keys_B, n):
    logits_BV = model.apply({"params": params}, hidden_BD, method="unembed")[:, :vocab_size]
    return sample(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, n), logits_BV, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _cached_step(model, sampling, vocab_size, params, cache, tokens_BT, real_B, seen_B, keys_B, n, source):
    """Feeds tokens_BT, of which real_B are real, to the cache and draws the token after the last real one."""
    del seen_B  # the cache knows
    segments_BT = (jnp.arange(tokens_BT.shape[1]) < real_B[:, None]).astype(jnp.int32)
    output = model.apply({"params": params}, {"tokens": tokens_BT, "segments": segments_BT, **source}, cache=cache)
    last_BD = output.hidden_BTD[jnp.arange(tokens_BT.shape[0]), real_B - 1]
    return _draw(model, sampling, vocab_size, params, last_BD, keys_B, n), output.cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _full_step(model, sampling, vocab_size, params, all_BT, tokens_BT, real_B, seen_B, keys_B, n, source):
    """As `_cached_step`, but `all_BT` holds every row's tokens so far and the model reads all of them."""
    rows = jnp.arange(all_BT.shape[0])
    # The newest tokens end at seen_B; writing a prompt again at its own place changes nothing.
    places_BT = (seen_B - real_B)[:, None] + jnp.arange(tokens_BT.shape[1])
    all_BT = all_BT.at[rows[:, None], places_BT].set(tokens_BT, mode="drop")
    segments_BT = (jnp.arange(all_BT.shape[1]) < seen_B[:, None]).astype(jnp.int32)
    output = model.apply({"params": params}, {"tokens": all_BT, "segments": segments_BT, **source})
    return _draw(model, sampling, vocab_size, params, output.hidden_BTD[rows, seen_B - 1], keys_B, n), all_BT
