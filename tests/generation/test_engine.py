"""The decoding loop: cached = uncached, batch = single, and where rows end."""

import dataclasses

import jax
import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, complete, generate
from tests.generation import families
from tests.models.test_gpt import GPT2, LLAMA, TINY, make
from tests.quick import quick

# All are seen; windows in every layer; in every second one.
SPECS = {"tiny": TINY, "llama": LLAMA, "banded": dataclasses.replace(GPT2, windows=(0, 3))}

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]


def lively(name):
    """A model that looks back, as one from scratch hardly does: what it sees shows in what it writes."""
    model, params = make(SPECS[name])
    return model, jax.tree.map(lambda x: 8 * x, params)


def run(name, prompts, sampling, max_tokens=12, call=generate, **how):
    how = {"context": 24, "vocab_size": 31, "end_of_text": None, **how}
    return call(*lively(name), prompts, max_tokens, sampling, **how)


UNLIKE = [[(7 * n + 3 * i) % 31 for i in range(n)] for n in range(1, 12)]  # one to eleven tokens


@pytest.mark.parametrize(
    "name, sampling", [*((name, SamplingSpec(0.0)) for name in SPECS), ("tiny", SamplingSpec(1.0, 7, 0.9))]
)
def test_cached_equals_uncached_token_for_token(name, sampling):
    """Prompts shorter and longer than the windows, in pieces of which their rings hold no more than one."""
    how = dict(call=complete, log_probabilities=True)
    cached, whole = run(name, UNLIKE, sampling, chunk=4, **how), run(name, UNLIKE, sampling, use_cache=False, **how)
    assert [row.tokens for row in cached] == [row.tokens for row in whole]
    scores = [[row.log_probabilities for row in rows] for rows in (cached, whole)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert len({str(row.tokens) for row in cached}) == 11


@pytest.mark.parametrize("name", ["gpt3", "rnn lstm", "t5 1.0"])
def test_pieces_are_one_prefill(name):
    """Of unlike prompts; windows, a state, and a decoder whose source comes with the first piece."""
    built, params, context = families.model(name)
    how = dict(context=context, vocab_size=61, end_of_text=None, log_probabilities=True)
    how |= families.sources(name, 11)
    one, pieces = (complete(built, params, UNLIKE, 3, SamplingSpec(0.0), chunk=n, **how) for n in (512, 3))
    assert [row.tokens for row in one] == [row.tokens for row in pieces]
    scores = [[row.log_probabilities for row in rows] for rows in (one, pieces)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_a_window_bounds_the_cache_and_each_bucket_has_one_program():
    from llm.generation import engine

    model, params = lively("banded")
    cache = jax.eval_shape(lambda: engine.prefill(model, params, engine.lay_out(UNLIKE, 9, 24, None), 4)[0])
    assert [[x.shape[2] for x in place] for place in cache.layers] == [[24, 24], [7, 7]]  # 3 before the query, and 4
    with pytest.raises(ValueError, match="takes 4 tokens of a row at once, got 5"):
        engine.feed(model, params, cache, np.zeros((11, 5), np.int32), np.ones(11, np.int32), {})
    with pytest.raises(InputError, match="chunk=0"):
        run("tiny", PROMPTS, SamplingSpec(0.0), chunk=0)
    before = engine.read_piece._cache_size(), engine._cached_step._cache_size()
    for length in range(1, 21):
        run("tiny", [[1] * length], SamplingSpec(0.9), max_tokens=2, chunk=8)
    # Rows of 8, 16 and 24 places: up to eight tokens are read to the end and one after them, and those before; in rows
    # of 8 there are none before.
    assert engine.read_piece._cache_size() - before[0] == 2
    assert engine._cached_step._cache_size() - before[1] == 6


@pytest.mark.parametrize("name", families.NAMES)
def test_rows_of_a_batch_are_single_runs_which_share_their_programs(name):
    """Of unlike prompts and sources; single rows of 9 to 11 tokens, and sources of 9 and 14, are of one bucket."""
    from llm.generation import engine

    built, params, context = families.model(name)
    given = families.sources(name, 11).get("sources")

    def ask(prompts, sources):
        return complete(
            built, params, prompts, 3, SamplingSpec(0.0), context=context, vocab_size=61, end_of_text=None,
            log_probabilities=True, **({"sources": sources} if given else {}),
        )  # fmt: skip

    batch, before = ask(UNLIKE, given), engine._cached_step._cache_size()
    for row in (8, 9, 10):
        (alone,) = ask([UNLIKE[row]], given and [given[row]])
        assert alone.tokens == batch[row].tokens
        np.testing.assert_allclose(alone.log_probabilities, batch[row].log_probabilities, atol=1e-5)
    ask([UNLIKE[8]], given and [[*given[8], *given[9]][:14]])
    assert engine._cached_step._cache_size() - before == 2


@pytest.mark.long
def test_batch_equals_single_runs():
    greedy = SamplingSpec(0.0)
    batch = run("tiny", PROMPTS, greedy)
    assert batch == [run("tiny", [p], greedy)[0] for p in PROMPTS]
    assert all(len(row) == 12 for row in batch)
    drawn = run("tiny", PROMPTS, SamplingSpec(1.0))
    assert drawn[0] == run("tiny", PROMPTS[:1], SamplingSpec(1.0))[0]  # row 0 draws by (seed, 0, n) in both
    assert drawn != run("tiny", PROMPTS, SamplingSpec(1.0), seed=1)
    assert drawn == run("tiny", PROMPTS, SamplingSpec(1.0))


def test_a_row_ends_at_the_end_of_text_and_the_others_go_on():
    free = run("tiny", PROMPTS, SamplingSpec(0.0))
    end = free[1][0]
    shown = []
    ended = run(
        "tiny", PROMPTS, SamplingSpec(0.0), end_of_text=end, on_token=lambda row, token: shown.append((row, token))
    )
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    assert [[t for r, t in shown if r == row] for row in range(3)] == ended


EVERYTHING = SamplingSpec(
    0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
    no_repeat_ngram=2, logit_bias=((3, 1.5), (4, float("-inf"))), min_tokens=3,
)  # fmt: skip
SCORED = dict(end_of_text=[5, 9], log_probabilities=True, call=complete)


def test_rows_with_limits_seeds_ends_and_penalties_of_their_own_are_single_runs():
    """A batch of unlike prompts, in two orders, with and without the cache, row by row as if it were alone."""
    how = SCORED
    limits, seeds = [12, 3, 7], [11, 12, 13]
    batch = run("tiny", PROMPTS, EVERYTHING, limits, seed=seeds, **how)
    turned = run("tiny", PROMPTS[::-1], EVERYTHING, limits[::-1], seed=seeds[::-1], **how)[::-1]
    whole = run("tiny", PROMPTS, EVERYTHING, limits, seed=seeds, use_cache=False, **how)
    single = [run("tiny", [p], EVERYTHING, n, seed=s, **how)[0] for p, n, s in zip(PROMPTS, limits, seeds)]
    for row, limit in enumerate(limits):
        for other in (turned, whole, single):
            assert batch[row].tokens == other[row].tokens and batch[row].ended == other[row].ended
            np.testing.assert_allclose(batch[row].log_probabilities, other[row].log_probabilities, atol=1e-5)
        tokens = [*PROMPTS[row], *batch[row].tokens]
        pairs = list(zip(tokens, tokens[1:]))
        assert len(set(pairs)) == len(pairs) and not {4, 5, 9} & set(batch[row].tokens)
        assert len(batch[row].tokens) == limit or (batch[row].ended == "end" and 3 <= len(batch[row].tokens) < limit)
    assert batch[1].ended == "length"


def test_log_probabilities_are_the_models_own():
    model, params = lively("tiny")
    for prompt, row in zip(PROMPTS, run("tiny", PROMPTS, EVERYTHING, [12, 3, 7], **SCORED)):
        tokens = [*prompt, *row.tokens]
        whole = {"tokens": np.array([tokens + [0] * (24 - len(tokens))], np.int32)}
        logits = np.float64(quick(logits_of(model))(params, whole))[0]
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        want = [logits[place - 1, tokens[place]] for place in range(len(prompt), len(tokens))]
        np.testing.assert_allclose(row.log_probabilities, want, atol=1e-4)


def logits_of(model):
    return lambda p, b: model.apply({"params": p}, model.apply({"params": p}, b).hidden_BTD, method="unembed")


def test_on_token_stops_its_row_alone():
    greedy = SamplingSpec(0.0)
    free = run("tiny", PROMPTS, greedy)
    count = [0, 0, 0]

    def third_of_row_1(row, token):
        count[row] += 1
        return row == 1 and count[row] == 3

    stopped = run("tiny", PROMPTS, greedy, call=complete, on_token=third_of_row_1)
    assert [row.tokens for row in stopped] == [free[0], free[1][:3], free[2]] and count == [12, 3, 12]
    assert [row.ended for row in stopped] == ["length", "stopped", "length"]


def test_steps_share_one_program_whatever_the_history():
    from llm.generation import engine

    before = engine._cached_step._cache_size()
    for n, prompt in enumerate(PROMPTS):
        run("tiny", [prompt], SamplingSpec(0.7, no_repeat_ngram=3, presence_penalty=0.5), 8 + n, seed=n)
    assert engine._cached_step._cache_size() - before == 2  # prompts of up to eight tokens, and one token


def test_limits():
    assert run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=0) == [[], [], []]
    assert run("tiny", [], SamplingSpec(0.0)) == []
    assert list(map(len, run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=[0, 2, 1]))) == [0, 2, 1]
    with pytest.raises(InputError, match="names the id 31: the vocabulary has 31"):
        run("tiny", PROMPTS, SamplingSpec(0.0, logit_bias=((31, 1.0),)))
    full = run("tiny", [[1] * 20], SamplingSpec(0.0), max_tokens=4)  # to the last place of the context
    assert full == run("tiny", [[1] * 20], SamplingSpec(0.0), max_tokens=4, use_cache=False) and len(full[0]) == 4
    for prompts, count, message in [([[]], 1, "empty"), ([[1] * 24], 1, "shorten"), ([[1] * 20], 5, "at most 4")]:
        with pytest.raises(InputError, match=message):
            run("tiny", prompts, SamplingSpec(0.0), max_tokens=count)


@pytest.mark.parametrize("max_tokens", [16, 17])
def test_without_a_limit_the_cache_holds_all_but_the_last_token(max_tokens):
    """Room is a power of two: 16 places for 1 + 15 tokens that are fed, 32 for 1 + 16."""
    prompts, sampling = [[n] for n in range(1, 31)], SamplingSpec(1.0)  # many rows: one place too few shows in some
    cached, whole = (run("tiny", prompts, sampling, max_tokens, context=None, use_cache=u) for u in (True, False))
    assert cached == whole == run("tiny", prompts, sampling, max_tokens) and len(cached[0]) == max_tokens


def test_with_the_cache_each_step_reads_one_token(monkeypatch):
    from llm.generation import engine

    shapes = {}
    for name in ("_cached_step", "_full_step"):
        step, seen = getattr(engine, name), shapes.setdefault(name, [])
        monkeypatch.setattr(
            engine, name, lambda *a, step=step, seen=seen: (seen.append((a[3], a[4].shape)), step(*a))[1]
        )
    run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=4)
    assert [tokens for _, tokens in shapes["_cached_step"]] == [(3, 8), (3, 1), (3, 1), (3, 1)]
    assert shapes["_full_step"] == []
    shapes["_cached_step"].clear()
    run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=12, end_of_text=range(31))
    assert len(shapes["_cached_step"]) == 1  # nothing is computed after the last row has ended
    run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=2, use_cache=False)
    assert [carried.shape for carried, _ in shapes["_full_step"]] == [(3, 8), (3, 8)]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    for sampling in (SamplingSpec(0.0), SamplingSpec(5.0)):
        drawn = run("tiny", PROMPTS, sampling, vocab_size=3)
        assert {t for row in drawn for t in row} <= {0, 1, 2}
