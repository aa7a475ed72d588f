"""Philox4x64-10 (Salmon et al. 2011), counter-based random words: the same as NumPy's, compiled.

A file of its own that calls nothing in another and is called from no other compiled function:
Numba's on-disk cache does not notice an edit in another file.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators
# (Numba infers the types; annotations would be ignored.)

import numpy as np
from numba import njit

_U32, _LOW_32 = np.uint64(32), np.uint64(0xFFFFFFFF)
_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_PHILOX_W0, _PHILOX_W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@njit(cache=True)
def _multiply_high(a, b):
    """The upper 64 of the 128 bits of a * b, from products of 32-bit halves, which fit 64."""
    a_low, a_high, b_low, b_high = a & _LOW_32, a >> _U32, b & _LOW_32, b >> _U32
    low_high = a_low * b_high
    middle = (a_low * b_low >> _U32) + (low_high & _LOW_32) + a_high * b_low
    return a_high * b_high + (low_high >> _U32) + (middle >> _U32)


@njit(cache=True)
def _sample(seed, index, words):
    """Fill words: uint64 [4 n], with key (seed, 0) and counters (1, 2, ..., n; index, 0, 0)."""
    for block in range(words.shape[0] // 4):
        c0, c1, c2, c3 = np.uint64(block + 1), index, np.uint64(0), np.uint64(0)
        k0, k1 = seed, np.uint64(0)
        for _ in range(10):
            high0, high1 = _multiply_high(_PHILOX_M0, c0), _multiply_high(_PHILOX_M1, c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, _PHILOX_M1 * c2, high0 ^ c3 ^ k1, _PHILOX_M0 * c0
            k0, k1 = k0 + _PHILOX_W0, k1 + _PHILOX_W1
        words[4 * block], words[4 * block + 1] = c0, c1
        words[4 * block + 2], words[4 * block + 3] = c2, c3


@njit(cache=True)
def fill(seed, start, words):
    """Fill row i with NumPy's Philox(key=(seed, 0), counter=(0, start + i, 0, 0)).random_raw().

    seed, start: uint64; words: uint64 [N, 4 n], written.
    """
    for i in range(words.shape[0]):
        _sample(seed, start + np.uint64(i), words[i])
