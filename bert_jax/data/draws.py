"""Random numbers as a pure function of counters: a draw depends on its keys and on nothing else.

So any example of any epoch can be made again, alone, on any host. The mixers are SplitMix64
(Steele et al. 2014) and lowbias32 (Wellons 2018).
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits64(*keys: np.ndarray | int) -> np.ndarray:
    """uint64 hash of the keys, broadcast against each other; at least one-dimensional."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix64(state + GOLDEN + np.asarray(key).astype(np.uint64))
    return state


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits32(row_keys: np.ndarray, columns: np.ndarray, stream: int) -> np.ndarray:
    """uint32 hash of (row key, column, stream); row_keys uint64 and columns broadcast."""
    rows = (row_keys ^ bits64(stream)).astype(np.uint64)
    x = ((rows >> np.uint64(32)).astype(np.uint32) + columns.astype(np.uint32) * np.uint32(0x9E3779B1))
    x = _mix32(x) ^ rows.astype(np.uint32)
    return _mix32(x)


def _mix32(x: np.ndarray) -> np.ndarray:
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def below(bits: np.ndarray, n: np.ndarray | int) -> np.ndarray:
    """int64 uniform on 0..n-1 from 64-bit draws, n < 2**32 (bias under n / 2**32)."""
    n = np.asarray(n).astype(np.uint64)
    return (((bits >> np.uint64(32)) * n) >> np.uint64(32)).astype(np.int64)


def chance(bits: np.ndarray, probability: float) -> np.ndarray:
    """bool, true with the given probability, from 32- or 64-bit draws."""
    scale = 2 ** (8 * bits.dtype.itemsize)
    return bits < bits.dtype.type(min(int(probability * scale), scale - 1))


def permutation(n: int, *keys: int) -> np.ndarray:
    """int64 [n], a keyed order of 0..n-1."""
    return np.argsort(bits64(*keys, np.arange(n)), kind='stable')
