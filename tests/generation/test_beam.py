"""Beam search: the best of all hypotheses, one beam is greedy, bans inside beams, rows that do not depend on others."""

import itertools

import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, beam, complete
from llm.generation.beam import beam_search
from llm.generation.constrained import Constraint, Vocabulary, regex_grammar
from tests.generation.families import NAMES, logits, model, sources
from tests.helpers import long_but

GREEDY = SamplingSpec(0.0)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
SMALL, STEPS, END = 4, 5, 3  # ids that may be drawn, tokens, the id that ends


def every_hypothesis(name, prompt, source, spec=GREEDY):
    """{(tokens, ended): log-probability} of all that can be written, by whole rows at once."""
    width = len(prompt) + STEPS
    rows = np.array([[*prompt, *tail] for tail in itertools.product(range(SMALL), repeat=STEPS)], np.int32)
    batch = {"tokens": rows}
    if source is not None:
        batch["source_tokens"] = np.repeat(np.array([source], np.int32), len(rows), 0)
    found = logits(name)(batch)[:, len(prompt) - 1 : width - 1, :SMALL]
    all_of = {}
    for row, scores in zip(rows.tolist(), found):
        total, tokens = 0.0, []
        for token, here in zip(row[len(prompt) :], scores):
            here, before = here.copy(), [*prompt, *tokens]
            if spec.no_repeat_ngram == 2:
                pairs = set(zip(before, before[1:]))
                here[[t != END and (before[-1], t) in pairs for t in range(SMALL)]] = -np.inf
            total += here[token] - np.logaddexp.reduce(here)
            if token == END:
                break
            tokens.append(token)
        all_of[tuple(tokens), "end" if len(tokens) < STEPS else "length"] = total
    return {key: total for key, total in all_of.items() if total > -np.inf}


def every_match(name, prompt, words):
    """{(tokens, ended): (log-probability, tokens that it counts)} of what can be written of words of ids 0 to 2."""
    rows = np.array([[*prompt, *tail] for tail in itertools.product(range(SMALL), repeat=STEPS)], np.int32)
    found = logits(name)({"tokens": rows})[:, len(prompt) - 1 : -1, :SMALL]
    all_of = {}
    for row, scores in zip(rows.tolist(), found):
        total, word = 0.0, ()
        for token, here in zip(row[len(prompt) :], scores):
            total += here[token] - np.logaddexp.reduce(here)
            if token == END:
                if word in words:
                    all_of[word, "end"] = total, len(word) + 1
                break
            word = (*word, token)
            longer = [other for other in words if other[: len(word)] == word]
            if longer in ([], [word]):
                if longer:
                    all_of[word, "end"] = total, len(word)
                break
        else:
            all_of[word, "length"] = total, len(word)
    return all_of


def search(name, prompts, beams, max_tokens=STEPS, **how):
    built, params, context = model(name)
    how = {"vocab_size": SMALL, "end_of_text": END, "context": context, **sources(name, len(prompts)), **how}
    return beam_search(built, params, prompts, max_tokens, beams, **how)


@pytest.mark.parametrize("name", long_but(["gpt3"], NAMES))
def test_enough_beams_find_the_best_of_all(name):
    source = sources(name, 1).get("sources", [None])[0]
    prompt = [1, 2, 0]
    every = every_hypothesis(name, prompt, source)
    assert len(every) == 364
    orders = set()
    for penalty in (0.0, 1.0, 2.0):
        # An end counts as a token.
        score = {k: total / (len(k[0]) + (k[1] == "end")) ** penalty for k, total in every.items()}
        want = sorted(score, key=lambda key: -score[key])
        (got,) = search(name, [prompt], 400, length_penalty=penalty)
        assert len(got) == 364 and [(h.tokens, h.ended) for h in got[:3]] == want[:3]
        np.testing.assert_allclose([h.score for h in got], [score[key] for key in want], atol=2e-4)
        for one in got:
            np.testing.assert_allclose(one.log_probability, every[one.tokens, one.ended], atol=2e-4)
        orders.add(tuple(want))
    assert len(orders) == 3  # the exponent acts


def test_bans_hold_inside_every_beam():
    spec = SamplingSpec(0.0, no_repeat_ngram=2)
    every = every_hypothesis("gpt3", [1, 2, 0], None, spec)
    (got,) = search("gpt3", [[1, 2, 0]], 400, sampling=spec)
    assert {(h.tokens, h.ended) for h in got} == set(every)
    for one in got:
        np.testing.assert_allclose(one.log_probability, every[one.tokens, one.ended], atol=2e-4)


def test_the_best_of_all_texts_that_match():
    """Some end by an end, some where nothing can be added, one is cut; few beams find matches alone."""
    words = ["0", "01", "0120", "012012", "2", "21", "2222222", "11", "110"]
    letters: list[bytes | None] = [b"0", b"1", b"2", None]
    constraint = Constraint(Vocabulary(letters, letters, [END]), regex_grammar("|".join(words)))
    every = every_match("gpt3", [1, 2, 0], [tuple(map(int, word)) for word in words])
    assert {ended for _, ended in every} == {"end", "length"} and len(every) == 9
    for penalty in (0.0, 2.0):
        score = {key: total / length**penalty for key, (total, length) in every.items()}
        want = sorted(score, key=lambda key: -score[key])
        (got,) = search("gpt3", [[1, 2, 0]], 400, length_penalty=penalty, constraint=constraint)
        assert [(h.tokens, h.ended) for h in got] == want
        np.testing.assert_allclose([h.score for h in got], [score[key] for key in want], atol=2e-4)
    few = search("gpt3", PROMPTS, 2, limits := [5, 3], constraint=constraint)
    for row, limit in zip(few, limits):
        assert 0 < len(row) <= 2
        for one in row:
            text = "".join(map(str, one.tokens))
            assert (
                text in words if one.ended == "end" else len(text) == limit and any(w.startswith(text) for w in words)
            )


def test_a_match_that_cannot_be_completed_is_left_to_others():
    letters: list[bytes | None] = [b"a", b"b", None, None]
    only_a_and_b = Vocabulary(letters, letters, [END])
    (got,) = search("gpt3", [[1, 2]], 4, constraint=Constraint(only_a_and_b, regex_grammar("abc|ba")))
    assert [(one.tokens, one.ended) for one in got] == [((1, 0), "end")]
    with pytest.raises(InputError, match="can go on with 'ab'"):
        search("gpt3", [[1, 2]], 4, constraint=Constraint(only_a_and_b, regex_grammar("abc")))
    (got,) = search("gpt3", [[1, 2]], 4, constraint=Constraint(only_a_and_b, regex_grammar("")))
    assert [(one.tokens, one.ended) for one in got] == [((), "end")]


@pytest.mark.parametrize("name", long_but(["gpt3"], ["gpt3", "rnn lstm", "t5 1.0"]))
def test_one_beam_is_greedy_and_rows_are_alone(name):
    """Few beams of unlike prompts with limits of their own: each row as if it were the only one."""
    built, params, context = model(name)
    limits, how = [9, 12], dict(vocab_size=61, end_of_text=[7, 20], context=context)
    spec = SamplingSpec(0.0, repetition_penalty=1.5)
    greedy = complete(built, params, PROMPTS, limits, spec, **how, **sources(name, 2))
    one = search(name, PROMPTS, 1, limits, sampling=spec, **how)
    assert [list(row[0].tokens) for row in one] == [row.tokens for row in greedy]
    assert [row[0].ended for row in one] == [row.ended for row in greedy]
    both = search(name, PROMPTS, 3, limits, sampling=spec, chunk=4, **how)
    more = {key: rows[::-1] for key, rows in sources(name, 2).items()}
    turned = search(name, PROMPTS[::-1], 3, limits[::-1], sampling=spec, chunk=4, **how, **more)[::-1]
    # A program for one row is compiled for one family alone: it takes most of the time.
    alone = [search(name, [p], 3, n, sampling=spec, **how)[0] for p, n in zip(PROMPTS, limits) if name == "gpt3"]
    programs = beam._first._cache_size(), beam._step._cache_size()
    for length in (1, 5, 8) if alone else ():  # with nine more all are of the bucket of the first, 16 places
        search(name, [[1] * length], 3, 9, sampling=spec, **how)
    assert (beam._first._cache_size(), beam._step._cache_size()) == programs
    for rows in (turned, alone):
        for row, other in zip(both, rows):
            assert [(h.tokens, h.ended) for h in row] == [(h.tokens, h.ended) for h in other]
            np.testing.assert_allclose([h.score for h in row], [h.score for h in other], atol=1e-5)
    for row in both:
        assert len({h.tokens for h in row}) == 3 and row[0].score >= row[1].score >= row[2].score


def test_limits_and_refusals():
    assert search("gpt3", [], 2) == []
    (row,) = search("gpt3", [[1]], 2, max_tokens=0)
    assert [(h.tokens, h.log_probability) for h in row] == [((), 0.0)]
    for beams, spec, message in [(0, GREEDY, "beams=0"), (2, SamplingSpec(0.7), "temperature must be 0"),
                                 (2, SamplingSpec(0.0, top_p=0.5), "top_p")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            search("gpt3", [[1]], beams, sampling=spec)
    with pytest.raises(InputError, match="length_penalty=nan"):
        search("gpt3", [[1]], 2, length_penalty=float("nan"))
