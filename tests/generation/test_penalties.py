"""Penalties, bans and biases, against loops over tokens in float64."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from llm.generation import SamplingSpec
from llm.generation.penalties import History, adjust_logits

V, ROOM = 7, 12


def adjusted(logits, spec, rows, ends=()):
    """Rows are (prompt, output); what stands after them in the history is junk that must not count."""
    tokens = np.full((len(rows), ROOM), 3, np.int32)
    for number, (prompt, output) in enumerate(rows):
        tokens[number, : len(prompt) + len(output)] = [*prompt, *output]
    prompts = jnp.array([len(prompt) for prompt, _ in rows])
    drawn = jnp.array([len(output) for _, output in rows])
    history = History(jnp.asarray(tokens), prompts, prompts + drawn)
    return adjust_logits(jnp.asarray(logits), spec, history, drawn, ends)


def oracle(logits, spec, prompt, output, ends):
    new, seen = np.float64(logits), [*prompt, *output]
    for token in range(V):
        if token not in ends:
            if token in seen:
                new[token] *= spec.repetition_penalty if new[token] <= 0 else 1 / spec.repetition_penalty
            if token in output:
                new[token] -= spec.presence_penalty + spec.frequency_penalty * output.count(token)
        new[token] += dict(spec.logit_bias).get(token, 0)
        if token in ends and len(output) < spec.min_tokens:
            new[token] = -np.inf
    n, banned = spec.no_repeat_ngram, new.copy()
    grams = {tuple(seen[i : i + n]) for i in range(len(seen) - n + 1)} if n else set()
    for token in range(V):
        if token not in ends and len(seen) >= n - 1 and (*seen[len(seen) - n + 1 :], token) in grams:
            banned[token] = -np.inf
    return banned if np.isfinite(banned).any() else new


SPECS = [
    SamplingSpec(repetition_penalty=2.0),
    SamplingSpec(presence_penalty=0.7),
    SamplingSpec(frequency_penalty=-0.3),
    *(SamplingSpec(no_repeat_ngram=n) for n in (1, 2, 3, 13, 20)),
    SamplingSpec(min_tokens=3),
    SamplingSpec(logit_bias=((2, -1.0), (5, 3.0), (6, -np.inf))),
    SamplingSpec(repetition_penalty=1.7, presence_penalty=0.2, frequency_penalty=0.1, no_repeat_ngram=2, min_tokens=2,
                 logit_bias=((0, 4.0),)),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("ends", [(), (1, 4)])
def test_against_an_oracle(spec, ends):
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(0, V, prompt).tolist(), rng.integers(0, 4, output).tolist())
        for prompt, output in itertools.product((1, 3, 6), (0, 1, 2, 6))
    ]
    logits = np.float32(rng.normal(size=(len(rows), V)))
    got = adjusted(logits, spec, rows, ends)
    want = [oracle(row, spec, *tokens, ends) for row, tokens in zip(logits, rows)]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    logits = np.array([[2.0, -1.0, 2.0, 2.0, -np.inf, 0, 0]])
    got = adjusted(logits, SamplingSpec(repetition_penalty=2.0), [([0, 1, 0, 4], [0, 1])])
    np.testing.assert_array_equal(got, [[1.0, -2.0, 2.0, 2.0, -np.inf, 0, 0]])  # once; 3, the padding, is not seen


def test_the_text_that_a_two_gram_ban_leaves():
    banned = np.isinf(adjusted(np.zeros((2, V)), SamplingSpec(no_repeat_ngram=2), [([1, 2, 3, 1], []), ([1], [2, 1])]))
    assert [set(np.flatnonzero(row)) for row in banned] == [{2}, {2}]


def test_a_ban_of_everything_is_lifted():
    everything = [(list(range(V)), [])]
    assert np.isfinite(adjusted(np.zeros((1, V)), SamplingSpec(no_repeat_ngram=1), everything)).all()
    left = adjusted(np.zeros((1, V)), SamplingSpec(no_repeat_ngram=1), everything, (4,))
    assert np.flatnonzero(np.isfinite(left)).tolist() == [4]


def test_what_is_off_needs_no_history_and_changes_nothing():
    for field in dataclasses.fields(SamplingSpec):
        assert not dataclasses.replace(SamplingSpec(0.5, 3, 0.9, 0.1), **{field.name: field.default}).looks_back
    logits = jnp.arange(V, dtype=jnp.bfloat16)[None]
    got = adjust_logits(logits, SamplingSpec(), None, jnp.zeros((1,), jnp.int32), (2,))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.float32(logits))
