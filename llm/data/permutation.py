"""A pseudo-random order of n things that is computed place by place, never written out."""

import numpy as np

ROUNDS = 12  # with 8, orders of three or four things are visibly uneven


def permute(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `places` in 0..n-1 goes: a bijection of 0..n-1 for every seed and epoch.

    A Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds n, walked on until the
    value is below n again (Black and Rogaway 2002): at most four steps each on average.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    value = np.asarray(places, np.uint64).copy()
    waiting = np.ones(value.shape, bool)
    while waiting.any():
        moved = value[waiting]
        left, right = moved >> half, moved & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        moved = (left << half) | right
        value[waiting] = moved
        waiting[waiting] = moved >= n
    return value.astype(np.int64)


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
