"""The decoding loop: cached = uncached, batch = single, and where rows end."""

import jax
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, generate
from tests.models.test_gpt import SPECS, make

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]


def run(name, prompts, sampling, max_tokens=12, **how):
    model, params = make(SPECS[name])
    params = jax.tree.map(
        lambda x: 8 * x, params
    )  # from scratch a model hardly looks back: what it sees would not show
    how = {"context": 24, "vocab_size": 31, "end_of_text": None, **how}
    return generate(model, params, prompts, max_tokens, sampling, **how)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("sampling", [SamplingSpec(0.0), SamplingSpec(1.0, top_k=7, top_p=0.9)], ids=str)
def test_cached_equals_uncached_token_for_token(name, sampling):
    assert run(name, PROMPTS, sampling) == run(name, PROMPTS, sampling, use_cache=False)


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


def test_limits():
    assert run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=0) == [[], [], []]
    assert run("tiny", [], SamplingSpec(0.0)) == []
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
            engine, name, lambda *a, step=step, seen=seen: (seen.append((a[4], a[5].shape)), step(*a))[1]
        )
    run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=4)
    assert [tokens for _, tokens in shapes["_cached_step"]] == [(3, 8), (3, 1), (3, 1), (3, 1)]
    assert shapes["_full_step"] == []
    run("tiny", PROMPTS, SamplingSpec(0.0), max_tokens=2, use_cache=False)
    assert [carried.shape for carried, _ in shapes["_full_step"]] == [(3, 24), (3, 24)]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    for sampling in (SamplingSpec(0.0), SamplingSpec(5.0)):
        drawn = run("tiny", PROMPTS, sampling, vocab_size=3)
        assert {t for row in drawn for t in row} <= {0, 1, 2}
