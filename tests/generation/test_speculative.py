"""Speculative decoding: greedy is plain greedy, draws have the model's own distribution, whatever guesses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, complete, speculative
from llm.generation.constrained import Constraint, Vocabulary, regex_grammar
from llm.generation.penalties import History
from llm.generation.speculative import Account, Draft, Lookup, _looked_up, speculate
from tests.generation.families import logits, model, sources
from tests.generation.test_engine import PROMPTS

RULES = SamplingSpec(0.0, repetition_penalty=1.4, no_repeat_ngram=3, min_tokens=2)


@functools.cache
def draft(name):
    """A model that guesses right now and then: the model's own weights, disturbed."""
    built, params, _ = model(name)
    rng = np.random.default_rng(5)
    return Draft(built, jax.tree.map(lambda x: x + np.float32(0.05 * rng.normal(size=x.shape)), params))


@pytest.mark.parametrize(
    "guesser, name",
    [
        ("draft", "gpt3"),
        pytest.param("draft", "rnn lstm", marks=pytest.mark.long),
        pytest.param("draft", "t5 1.0", marks=pytest.mark.long),
        ("lookup", "llama"),
        pytest.param("lookup", "encdec post-norm", marks=pytest.mark.long),
    ],
)
def test_greedy_is_plain_greedy(guesser, name):
    built, params, context = model(name)
    how = dict(context=context, vocab_size=61, end_of_text=[7, 20], **sources(name, 3))
    limits, account = [14, 5, 16], Account()  # to the last place of 16
    plain = complete(built, params, PROMPTS, limits, RULES, **how)
    guess = draft(name) if guesser == "draft" else Lookup()
    fast = speculate(built, params, guess, PROMPTS, limits, RULES, ahead=3, account=account, chunk=2, **how)
    assert [(row.tokens, row.ended) for row in fast] == [(row.tokens, row.ended) for row in plain]
    if guesser == "draft":
        assert 0 < account.kept < account.guessed and account.calls < max(len(row.tokens) for row in plain)


def test_greedy_by_a_grammar_is_plain_greedy_by_it():
    built, params, context = model("llama")
    letters: list[bytes | None] = [bytes([97 + n % 26]) if n else None for n in range(61)]
    constraint = Constraint(Vocabulary(letters, letters, [0]), regex_grammar("(ab?c|[d-m]x){2}[n-z]{1,6}"))
    how = dict(context=context, vocab_size=61, end_of_text=[0], constraint=constraint)
    limits, account = [14, 5, 16], Account()
    plain = complete(built, params, PROMPTS, limits, RULES, **how)
    for guess in (draft("llama"), Lookup()):
        fast = speculate(built, params, guess, PROMPTS, limits, RULES, ahead=3, account=account, **how)
        assert [(row.tokens, row.ended) for row in fast] == [(row.tokens, row.ended) for row in plain]
    assert {row.ended for row in plain} == {"end", "length"} and account.kept > 0
    (empty,) = speculate(built, params, Lookup(), [[1]], 3, RULES, **how | {
        "constraint": Constraint(Vocabulary(letters, letters, [0]), regex_grammar(""))})  # fmt: skip
    assert (empty.tokens, empty.ended) == ([], "end")


@pytest.mark.parametrize(
    "guesser, words",
    [("draft", None), ("lookup", None), ("draft", ["aab", "aac", "abc", "bab", "bba", "bbb", "bca", "cab", "cba"])],
)
def test_draws_have_the_models_own_distribution(guesser, words):
    """Three tokens of 5,000 rows, of words where they are given, against the probabilities of all 27 by whole rows."""
    built, params, context = model("llama")
    small, rows, prompt = 3, 5000, [1, 2, 1]
    spec = SamplingSpec(1.3, top_p=0.97)
    every = np.array([[*prompt, a, b, c] for a in range(small) for b in range(small) for c in range(small)], np.int32)
    found = logits("llama")({"tokens": every})[:, 2:5, :small] / spec.temperature
    constraint = None
    if words is not None:
        letters: list[bytes | None] = [b"a", b"b", b"c"]
        constraint = Constraint(Vocabulary(letters, letters), regex_grammar("|".join(words)))
        begins = {word[:n] for word in words for n in (1, 2, 3)}
        spelled = ["".join("abc"[i] for i in row[3:]) for row in every.tolist()]
        fits = [[[text[:n] + letter in begins for letter in "abc"] for n in range(3)] for text in spelled]
        fits = np.array(fits) | ~np.array(fits).any(-1, keepdims=True)  # after what fits no word all are equal: 0
        found = np.where(fits, found, -np.inf)
    p = np.exp(found - np.logaddexp.reduce(found, axis=-1, keepdims=True))
    order = np.argsort(-p, axis=-1)
    ordered = np.take_along_axis(p, order, axis=-1)
    kept = np.cumsum(ordered, axis=-1) - ordered < spec.top_p
    np.put_along_axis(p, order, np.where(kept, ordered, 0), axis=-1)
    p /= p.sum(-1, keepdims=True)
    want = np.prod([p[:, n, :][np.arange(27), every[:, 3 + n]] for n in range(3)], axis=0)
    guess, account = (draft("llama") if guesser == "draft" else Lookup(1)), Account()
    drawn = speculate(
        built, params, guess, [prompt] * rows, 3, spec, ahead=2, account=account, context=context, vocab_size=small,
        end_of_text=None, constraint=constraint,
    )  # fmt: skip
    counts = np.bincount([np.dot(row.tokens, [9, 3, 1]) for row in drawn], minlength=27)
    assert 0 < account.kept < account.guessed
    assert counts[want == 0].sum() == 0
    rare = rows * want < 5
    observed, expected = [*counts[~rare], counts[rare].sum()], [*rows * want[~rare], rows * want[rare].sum()]
    terms = [(o - e) ** 2 / e for o, e in zip(observed, expected) if e > 0]
    degrees = len(terms) - 1
    assert degrees > (8 if words is None else 4)
    assert sum(terms) < degrees + 4 * (2 * degrees) ** 0.5  # of a chi-square, mean and four deviations


def test_look_up_goes_on_as_the_text_did():
    tokens = jnp.array([[5, 6, 7, 8, 5, 6, 0, 0, 0], [1, 2, 9, 2, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0, 0]])
    history = History(tokens, jnp.array([1, 1, 1]), jnp.array([6, 5, 2]))
    assert _looked_up(history, 2, 3).tolist()[0] == [7, 8, 5]
    assert _looked_up(history, 1, 3).tolist()[:2] == [[7, 8, 5], [2, 2, 2]]  # the last place, repeated


def test_rows_do_not_depend_on_each_other_and_limits():
    built, params, context = model("llama")
    how, spec = dict(context=context, vocab_size=61, end_of_text=None, ahead=3), SamplingSpec(1.0)
    both = speculate(built, params, Lookup(), PROMPTS, [12, 5, 14], spec, seed=[4, 5, 6], **how)
    turned = speculate(built, params, Lookup(), PROMPTS[::-1], [14, 5, 12], spec, seed=[6, 5, 4], **how)
    assert [row.tokens for row in both] == [row.tokens for row in turned[::-1]]
    assert [len(row.tokens) for row in both] == [12, 5, 14]
    programs = speculative._guess._cache_size(), speculative._check._cache_size()
    speculate(built, params, Lookup(), [[1] * 2, [2] * 5, [3] * 8], [12, 5, 9], spec, **how)  # of the same buckets
    assert (speculative._guess._cache_size(), speculative._check._cache_size()) == programs
    assert speculate(built, params, Lookup(), [], 3, spec, **how) == []
    for guess, ahead, message in [(Lookup(0), 3, "ngram=0"), (Lookup(), 0, "ahead=0")]:
        with pytest.raises(InputError, match=message):
            speculate(built, params, guess, PROMPTS, 3, spec, **(how | {"ahead": ahead}))
    with pytest.raises(InputError, match="the draft's context is 24: 27 tokens"):
        speculate(built, params, draft("gpt3"), PROMPTS, 20, spec, **(how | {"context": 2048}))
    with pytest.raises(InputError, match="read a source"):
        speculate(built, params, draft("t5 1.0"), PROMPTS, 20, spec, **(how | {"context": 2048}))
