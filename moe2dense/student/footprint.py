"""Bytes that building a student takes. No torch here: the plan and the walk count the same way."""

import math

# T tokens, H hidden, M student FFN width, P pool of neurons
FP32 = 4
FIT_COPIES = 5  # weights, gradients, two Adam moments, the best values so far
STATE_COPIES = (
    5  # [T, H] of the student while a layer is built: hidden states, FFN inputs and targets, and what they are made of
)


def polish_bytes(parameters: int) -> int:
    """Memory of fitting a whole student of so many parameters end to end."""
    return FP32 * FIT_COPIES * parameters


def pool_bytes(pool: int, hidden: int) -> int:
    """Memory of eliminating neurons of a pool: Gram matrix, its factor and inverse, one to spare; the neurons and their outputs."""
    return FP32 * (4 * pool**2 + 6 * pool * hidden)


def pool_limit(budget: int, width: int, hidden: int = 0) -> int:
    """Most neurons whose elimination fits in `budget` bytes; never fewer than `width`."""
    b, c = 6 * hidden, max(budget, 0) // FP32
    return max(width, (math.isqrt(b * b + 16 * c) - b) // 8)


def refit_bytes(width: int) -> int:
    """Memory of the refit's Gram matrix in float32 and of its float64 copy and factor."""
    return (FP32 + 2 * 8) * width**2


def layer_bytes(layer: int, ffn: int, width: int, hidden: int, pool: int) -> int:
    """Most memory that building one layer takes beside its hidden states: `layer` and `ffn` parameters, a pool of neurons to choose from."""
    fits = max(FP32 * FIT_COPIES * layer, FP32 * (layer - ffn + (1 + FIT_COPIES) * ffn))
    choice = FP32 * layer + max(pool_bytes(pool, hidden) if pool > width else 0, refit_bytes(width) + FP32 * 2 * ffn)
    return max(fits, choice)
