"""Pack whole numbers bit by bit, highest bit first, and read them again; and the older way, as many as fit into 64 bits."""

import math

import numpy as np

# n positions, k numbers of each


def id_bits(vocabulary: int) -> int:
    """Return how many bits an id takes. The logarithm is float32's, as where the sets are written."""
    return max(1, math.ceil(float(np.log2(np.float32(vocabulary)))))


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the numbers [n, count] int64 of bytes [n, B] uint8. Raises ValueError where there are too few bytes."""
    if packed.shape[1] * 8 < bits * count:
        raise ValueError(f"{packed.shape[1]} bytes hold no {count} numbers of {bits} bits")
    digits = np.unpackbits(packed, axis=1, count=bits * count).reshape(len(packed), count, bits)
    numbers = np.zeros((len(packed), count), np.int64)
    for place in range(bits):
        numbers = (numbers << 1) | digits[:, :, place]
    return numbers


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return the bytes [n, B] of numbers [n, k] that have `bits` bits; the last byte is filled up with zeros."""
    places = np.arange(bits - 1, -1, -1)
    digits = ((numbers[:, :, None] >> places) & 1).astype(np.uint8)
    return np.packbits(digits.reshape(len(numbers), -1), axis=1)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the numbers [n, count] of 64-bit words [n, W]: as many as fit in each, lowest bits first, none across two words."""
    each = 64 // bits
    if words.shape[1] * each < count:
        raise ValueError(f"{words.shape[1]} words hold no {count} numbers of {bits} bits")
    shifts = (np.arange(each) * bits).astype(np.uint64)
    mask = np.uint64((1 << bits) - 1)
    numbers = (words.astype(np.uint64)[:, :, None] >> shifts) & mask
    return numbers.reshape(len(words), -1)[:, :count].astype(np.int64)
