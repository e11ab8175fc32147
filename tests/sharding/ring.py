"""Ring attention of host devices against float64: the program of `test_ring.py`.

    JAX_NUM_CPU_DEVICES=8 python -m tests.sharding.ring 4 reference causal

runs cases of `CASES` on two rings of 4 devices, forward and backward, and prints the name of each and what `off` says.
"""

import json
import sys

import jax
import numpy as np

from llm import sharding
from llm.sharding import MeshSpec
from tests.conformance import attention as table
from tests.conformance.attention import KEY, Case, _dense, _documents, _lengths, _mask, _prefix, _restarted, _shuffled
from tests.quick import quick

_SELF = dict(B=2, T=32, S=32, N=4, K=2, H=5, Hv=7)
CASES: dict[str, Case] = {
    "full, bias of all": Case(**_SELF, bias=(2, 4, 32, 32)),
    "causal": Case(**_SELF, mask=_mask(causal=True), rate=0.3),
    "causal window, sinks": Case(**_SELF, mask=_mask(causal=True, window=(5, None)), sinks=True),
    "window of both sides, soft cap": Case(**_SELF, mask=_mask(window=(3, 2)), softcap=2.0, scale=0.7),
    "packing, restarted, buckets, dropout": Case(
        **_SELF, mask=_mask(_restarted, causal=True), bias="table", rate=0.3, sinks=True
    ),
    "prefix, bias of rows": Case(**_SELF, mask=_mask(_prefix, causal=True), bias=(1, 1, 32, 1)),
    "lengths, bias of keys": Case(**_SELF, mask=_mask(_lengths), bias=(2, 1, 1, 32), rate=0.2),
    "shuffled positions": Case(**_SELF, mask=_mask(_shuffled, causal=True, window=(9, 4)), rate=0.3),
    "source": Case(**_SELF | {"S": 16}, mask=_mask(_documents)),
    "everything": Case(
        **_SELF, mask=_mask(_documents, _lengths, _prefix, _dense, causal=True, window=(12, None)),
        bias=(2, 4, 32, 32), sinks=True, softcap=3.0, scale=0.4, rate=0.3,
    ),
    "everything, striped": Case(
        **_SELF, mask=_mask(_documents, _lengths, _prefix, _dense, causal=True), bias=(1, 4, 32, 32), sinks=True,
        softcap=3.0, scale=0.4, rate=0.3,
    ),
}  # fmt: skip


def off(c: Case, implementation: str) -> float:
    """The largest distance to float64 of the output, the log-sum-exp or a gradient, in the largest numbers' units."""
    arrays, mask, cotangents = table.inputs(c)

    def f(arrays):
        given = {n: x for n, x in arrays.items() if n not in "qkv"}
        return sharding.attention(
            arrays["q"], arrays["k"], arrays["v"], mask=mask, scale=c.scale, softcap=c.softcap, dropout_rate=c.rate,
            dropout_key=KEY if c.rate else None, implementation=implementation, return_lse=True, **given,
        )  # fmt: skip

    got = table.with_gradients(f, arrays, cotangents, lse=True, jit=quick)[0]
    truth, _ = table.expected(c, arrays, mask, cotangents)
    assert got.keys() == truth.keys()
    distances = []
    for name, want in truth.items():
        have, infinite = np.float64(got[name]), np.isinf(want)
        np.testing.assert_array_equal(have[infinite], want[infinite], err_msg=name)
        have, want = have[~infinite], want[~infinite]
        distances.append(float(np.abs(have - want).max() / max(1.0, np.abs(want).max())))
    return max(distances)


def main(devices: int, implementation: str, *names: str) -> None:
    """Prints a line for each case."""
    with jax.set_mesh(sharding.make_mesh(MeshSpec(context=devices))):
        for name in names or CASES:
            print(json.dumps([name, off(CASES[name], implementation)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
