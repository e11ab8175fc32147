"""Eight host devices give the loss and the gradients of one, for every family and kind of mesh (float32, jitted)."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment, long_but
from tests.sharding.equality import FAMILIES


def test_the_table_does_not_shrink():
    assert {family: len(meshes) for family, (*_, meshes) in FAMILIES.items()} == {
        "rnn": 4, "classifier": 1, "encdec": 1, "bert": 1, "t5": 1, "gpt": 5, "mixture": 3, "mixture, the rest": 8,
        "classifier, the rest": 4, "encdec, the rest": 4, "bert, the rest": 4, "t5, the rest": 4,
    }  # fmt: skip


@pytest.mark.parametrize("family", long_but(("gpt", "t5"), FAMILIES))
def test_eight_devices_equal_one(family):
    result = subprocess.run(
        [sys.executable, "-m", "tests.sharding.equality", family],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sizes for sizes, *_ in found] == FAMILIES[family][2]
    for sizes, loss, gradient in found:
        assert loss < 1e-5 and gradient < 1e-5, (sizes, loss, gradient)
