"""Draw random numbers that depend on a seed and a count alone, whatever was drawn before."""

import numpy as np


def uniforms(seed: int, number: int, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1) that depend on the seed and the sequence's number alone, never on how sequences are grouped."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**63, number])).random(count)
