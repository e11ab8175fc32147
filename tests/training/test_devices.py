"""One device or eight: the same loss, gradient and update (float32, jitted, host devices): `tests.training.devices`."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, environment
from tests.training.devices import MESHES

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found():
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.devices"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_equal_one_and_all_skip_a_step_that_one_has_bad_rows_in(found, mesh):
    """Losses and norms of the gradient, and after three steps every parameter and moment; the second is skipped."""
    one = found["steps_with_a_bad_one"][mesh]
    assert one["metrics"] < 1e-5 and one["arrays"] < 1e-4, one
    here, all_of_one = one["skipped"]
    assert here == all_of_one == [[[0, 0], [1, 1], [0, 0]], 1]


def test_micro_batches_in_any_order_give_the_gradient_of_the_batch(found):
    """On one device and on eight, in each number; one of four micro-batches has nothing to train on."""
    off = found["micro_batches"]["gradients"]
    assert len(off) == 10
    for name, (loss, gradient) in off.items():
        assert loss < 1e-5 and gradient < 1e-5, (name, loss, gradient)


def test_a_bad_micro_batch_changes_nothing(found):
    assert all(kept == [[1, 1], True] for kept in found["micro_batches"]["kept"].values()), found["micro_batches"]


def test_each_optimizer_updates_on_eight_devices_as_on_one(found):
    assert set(found["optimizers"]) == {"adafactor", "muon", "lion"}
    for name, (far, moved, arrays) in found["optimizers"].items():
        assert far < 1e-5 and moved == arrays, (name, far, moved, arrays)


def test_a_replay_on_eight_devices_sees_each_layer_as_on_one(found):
    one, eight = found["replayed"]
    assert [call[:4] for call in eight] == [call[:4] for call in one]
    np.testing.assert_allclose([call[4] for call in eight], [call[4] for call in one], rtol=1e-4)
    bad = next(call for call in eight if call[2])
    assert bad[:2] == ["stack/layers/mlp/down", 1], bad
