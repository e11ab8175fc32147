"""Packed matrices against an independent reading of their bytes, and their products against numpy in float64."""

import os

import jax
import numpy as np
import pytest

from llm.data import cache
from llm.nn import native
from llm.nn.packed import pack, product, products, unpack

RNG = np.random.default_rng(0)


def read(packed) -> np.ndarray:
    """The weights, one by one, as llama.cpp lays out Q8_0 and Q4_1."""
    values, scales = np.asarray(packed.values), np.asarray(packed.scales)
    outputs, groups = scales.shape
    out = np.zeros((outputs, 32 * groups))
    for o in range(outputs):
        for g in range(groups):
            for i in range(32):
                if packed.least is None:
                    weight = float(scales[o, g]) * int(values[o, g, i])
                else:
                    byte = int(values[o, g, i % 16])
                    part = byte & 15 if i < 16 else byte >> 4
                    weight = float(scales[o, g]) * part + float(np.asarray(packed.least)[o, g])
                out[o, 32 * g + i] = weight
    return out


@pytest.fixture(scope="module")
def compiled():
    reason = native.load(cache.folder() / "kernels")
    if reason:
        pytest.skip(f"no compiled kernel: {reason}")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_to_the_nearest_value(bits):
    matrix = RNG.normal(size=(5, 96)).astype(np.float32) * np.array([1e-3, 1, 50, 0, 1])[:, None].astype(np.float32)
    matrix[4] += 3  # no zero in its range
    packed = pack(matrix, bits)
    weights = read(packed)
    np.testing.assert_allclose(np.asarray(unpack(packed)), weights, rtol=1e-6, atol=1e-9)
    groups = matrix.reshape(5, 3, 32)
    step = np.abs(groups).max(-1) / 127 if bits == 8 else (groups.max(-1) - groups.min(-1)) / 15
    # Half a step, and what float16 takes off the scale and the least weight over the whole range.
    allowed = step / 2 + (127 if bits == 8 else 15) * (step * 2**-11 + 2**-25) + np.abs(groups).max(-1) * 2**-11
    assert (np.abs(weights - matrix).reshape(5, 3, 32).max(-1) <= allowed).all()
    assert not weights[3].any()
    size = sum(x.nbytes for x in jax.tree.leaves(packed))
    assert size == 5 * 3 * (32 * bits // 8 + (2 if bits == 8 else 4))


def test_four_bits_give_back_what_was_four_bits():
    scales, least = (2.0 ** RNG.integers(-8, -3, (7, 2, 1)) for _ in range(2))
    parts = RNG.integers(0, 16, (7, 2, 32))
    parts[..., 0], parts[..., 1] = 0, 15
    matrix = (scales * parts - least).reshape(7, 64).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(unpack(pack(matrix, 4))), matrix)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs, inputs", [(3, 32), (33, 64), (5, 96), (192, 576)])
@pytest.mark.parametrize("how", ["xla", "native"])
def test_products_are_those_of_the_rounded_weights(bits, outputs, inputs, how, request):
    if how == "native":
        request.getfixturevalue("compiled")
    packed = pack(RNG.normal(size=(outputs, inputs)).astype(np.float32), bits, native=how == "native")
    weights = read(packed)
    for rows in (1, 2, 5, 130):
        x = RNG.normal(size=(rows, inputs)).astype(np.float32)
        want = x.astype(np.float64) @ weights.T
        found = jax.jit(product)(x, packed)
        allowed = np.full_like(want, 2e-6 * inputs)
        if how == "native":  # rounds a row to 16 bits where it has no tile to compute
            steps = np.abs(x).reshape(rows, -1, 32).max(-1).repeat(32, -1) / 32767
            allowed += steps / 2 @ np.abs(weights).T
        assert (np.abs(found - want) <= allowed).all(), (rows, np.abs(found - want).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("how", ["xla", "native"])
def test_several_matrices_at_once(bits, how, request):
    if how == "native":
        request.getfixturevalue("compiled")
    matrices = [pack(RNG.normal(size=(n, 96)).astype(np.float32), bits, native=how == "native") for n in (40, 7, 300)]
    for rows in (1, 6):
        x = RNG.normal(size=(rows, 96)).astype(np.float32)
        found = jax.jit(products)(x, matrices)
        assert [y.shape for y in found] == [(rows, 40), (rows, 7), (rows, 300)]
        for y, packed in zip(found, matrices):
            np.testing.assert_allclose(y, x.astype(np.float64) @ read(packed).T, atol=2e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(compiled, bits, bad):
    x = np.ones((1, 64), np.float32)
    packed = pack(RNG.normal(size=(4, 64)).astype(np.float32), bits, native=True)
    assert np.isfinite(product(x, packed)).all()
    x[0, 40] = bad
    assert not np.isfinite(product(x, packed)).any()
    assert not np.asarray(product(np.zeros_like(x), packed)).any()


def test_one_of_several_layers():
    matrix = RNG.normal(size=(2, 4, 64)).astype(np.float32)
    packed = pack(matrix, 8)
    assert packed.shape == (4, 64)
    np.testing.assert_array_equal(unpack(packed[1]), unpack(pack(matrix[1], 8)))


@pytest.mark.parametrize("compiler, said", [("no-such-compiler", "no C++ compiler"), ("false", "could not make it")])
def test_without_a_compiler_it_says_why(tmp_path, monkeypatch, compiler, said):
    monkeypatch.setitem(os.environ, "CXX", compiler)
    assert said in native.load(tmp_path / "kernels")


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="inputs that 32 divides"):
        pack(np.zeros((4, 40), np.float32), 8)
