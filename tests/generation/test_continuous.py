"""Continuous batching: every row as if it were alone, and nothing compiled after the first of each length."""

import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, complete, continuous
from llm.generation.continuous import ContinuousBatch, Request
from tests.generation.families import model, sources
from tests.generation.test_engine import EVERYTHING
from tests.helpers import long_but


def requests(name, lengths, limits):
    rng = np.random.default_rng(0)
    given = sources(name, 3).get("sources", [None])
    return [
        Request(rng.integers(0, 61, length).tolist(), limit, seed=n, source=given[n % len(given)])
        for n, (length, limit) in enumerate(zip(lengths, limits))
    ]


def batch(name, sampling, slots, room, **how):
    built, params, _ = model(name)
    how = {"vocab_size": 61, "end_of_text": [7, 20], "source_room": 8 if sources(name, 1) else None, **how}
    return ContinuousBatch(built, params, sampling, slots=slots, room=room, **how)


@pytest.mark.parametrize("name", long_but(["gpt3"], ["gpt3", "rnn lstm", "t5 1.0", "encdec post-norm"]))
def test_rows_that_come_and_go_are_single_runs(name):
    built, params, _ = model(name)
    asked = requests(name, (3, 7, 1, 8, 5, 2), (9, 1, 12, 4, 6, 10))
    engine = batch(name, EVERYTHING, 2, 24, log_probabilities=True, chunk=4)
    got = dict(engine.run(asked))
    assert sorted(got) == list(range(6)) and engine.idle
    for number, one in enumerate(asked):
        more = {} if one.source is None else {"sources": [one.source]}
        (want,) = complete(
            built, params, [one.prompt], one.max_tokens, EVERYTHING, seed=[one.seed], context=24, vocab_size=61,
            end_of_text=[7, 20], log_probabilities=True, **more,
        )  # fmt: skip
        assert (got[number].tokens, got[number].ended) == (want.tokens, want.ended), number
        np.testing.assert_allclose(got[number].log_probabilities, want.log_probabilities, atol=1e-5)


def test_fifty_requests_compile_a_step_and_a_prefill_for_each_bucket_and_no_more():
    before = continuous._admit._cache_size(), continuous._step._cache_size()
    asked = requests("llama", [17 + n % 32 for n in range(50)], [1 + n % 5 for n in range(50)])
    engine = batch("llama", SamplingSpec(1.0), 4, 64)
    assert len(list(engine.run(asked))) == 50
    assert continuous._admit._cache_size() - before[0] == 2  # up to 32 tokens, up to 64
    assert continuous._step._cache_size() - before[1] == 1


def test_a_caller_stops_its_row_and_requests_may_come_late():
    seen = []
    engine = batch("llama", SamplingSpec(1.0), 4, 64, on_token=lambda n, token: seen.append((n, token)) or n == 0)
    first = engine.submit(Request([1, 2], 9))
    done = engine.step()
    late = engine.submit(Request([3], 2))
    while not engine.idle:
        done += engine.step()
    found = dict(done)
    assert found[first].ended == "stopped" and len(found[first].tokens) == 1
    assert [t for n, t in seen if n == late] == found[late].tokens
    assert engine.step() == []


def test_refusals():
    engine = batch("llama", SamplingSpec(1.0), 4, 64)
    for request, message in [
        (Request([], 1), "empty"), (Request([1] * 60, 5), "at most 4"), (Request([1], 0), "max_tokens=0"),
        (Request([1], 1, seed=-1), "seed=-1"), (Request([1], 1, source=[1]), "reads none"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            engine.submit(request)
    with pytest.raises(InputError, match="room=4096"):
        batch("llama", SamplingSpec(1.0), 4, 4096)
    with pytest.raises(InputError, match="chunk=0"):
        batch("llama", SamplingSpec(1.0), 4, 64, chunk=0)
    with pytest.raises(InputError, match="source_room=8"):
        batch("llama", SamplingSpec(1.0), 4, 64, source_room=8)
    with pytest.raises(InputError, match="9 tokens, the room is 8: shorten"):
        batch("t5 1.0", SamplingSpec(1.0), 1, 64).submit(Request([1], 1, source=[1] * 9))
