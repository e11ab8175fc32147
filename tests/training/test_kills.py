"""Twenty kills at random moments: the run ends as one that was never touched (one CPU device, float32, jitted)."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm.training.metrics import OF_THE_MACHINE
from tests.helpers import ROOT, environment
from tests.training.test_resume import arrays, rows

EVERY = 5  # steps between checkpoints


@pytest.mark.long
def test_twenty_kills_at_random_moments_change_nothing(corpus, tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.killing", str(corpus), str(tmp_path), "0"],
        cwd=ROOT, env=environment(**cache), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    starts = found["starts"]
    assert [start["code"] for start in starts] == [-9] * 20 + [0], found["last"]

    assert sum(start["in_a_save"] for start in starts) >= 1, starts
    resumed = [start for start in starts if start["resumed"] is not None]
    assert len({start["resumed"] for start in resumed}) >= 4
    for start in starts:
        # No broken checkpoint is picked, and the newest whole one is.
        assert start["resumed"] in (None, start["whole"]), starts
        # A save begins after its row, and not before the one before it is whole.
        assert start["whole"] >= (start["rows"] - 1) // EVERY * EVERY - EVERY, starts

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [row["step"] for row in rows(killed)] == list(range(1, 141))
    for mine, other in zip(rows(killed), rows(whole)):
        assert {name: mine[name] for name in mine.keys() - set(OF_THE_MACHINE)} == {
            name: other[name] for name in other.keys() - set(OF_THE_MACHINE)
        }
    for x, y in zip(jax.tree.leaves(arrays(killed, 140)), jax.tree.leaves(arrays(whole, 140))):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    for name in ("validation", "train_tokens", "steps"):
        assert summaries[0][name] == summaries[1][name], name
