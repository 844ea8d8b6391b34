"""Bytes that building a student takes. No torch here: the plan and the build count the same way."""

import math

# T tokens, H hidden, M student FFN width, P pool of neurons
FP32 = 4
FIT_COPIES = 5  # weights, gradients, two Adam moments, the best values so far
STATE_COPIES = (
    5  # [T, H] of the student while a layer is built: hidden states, FFN inputs and targets, and what they are made of
)


def heal_bytes(parameters: int) -> int:
    """Memory of fitting a whole student of so many parameters end to end."""
    return FP32 * FIT_COPIES * parameters


def hint_layers(layers: int, each: int, budget: int) -> range:
    """Which of so many layers keep the teacher's states of `each` bytes for the heal: all but the last, or evenly spaced ones that fit."""
    most = min(layers - 1, budget // max(each, 1))
    return range(-(-layers // (most + 1)) - 1, layers - 1, -(-layers // (most + 1))) if most > 0 else range(0)


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


def refit_limit(budget: int) -> int:
    """Most neurons whose refit's matrices fit in `budget` bytes."""
    return max(1, math.isqrt(max(budget, 0) // (FP32 + 2 * 8)))


def rows_at_once(width: int) -> int:
    """Tokens whose activations are made at once: a matrix of them takes some 64 MB, and holds 256 to 8192 tokens."""
    return max(256, min(8192, 16_000_000 // max(width, 1)))


def activation_bytes(width: int, tokens: int) -> int:
    """Memory of the neurons' activations of the tokens that pass an FFN at once: gate, up, the activated gate, their product."""
    return 4 * FP32 * width * min(rows_at_once(width), tokens)


def trained_bytes(width: int, hidden: int, batch: int) -> int:
    """Activations of `batch` tokens that wait for their gradients, and these: neurons, and (hidden > 0) what attention and norms keep."""
    return FP32 * batch * (7 * width + 16 * hidden)


def layer_bytes(
    layer: int, ffn: int, width: int, hidden: int, pool: int, tokens: int, limit: int, local_batch: int = 0, layer_batch: int = 0
) -> int:  # fmt: skip
    """Most memory that building one layer takes beside its hidden states: `layer` and `ffn` parameters, a pool of neurons to choose from.

    The largest of choosing neurons, of the refit (of `limit` neurons at once), and of the fits with batches of so many tokens (0 = no such
    fit). A fit's optimiser works on one tensor at a time, for which it takes two more of that size.
    """
    rest, at_once, spare = FP32 * (layer - ffn), activation_bytes(width, tokens), FP32 * 2 * width * hidden
    choice = pool_bytes(pool, hidden) + activation_bytes(pool, tokens) if pool > width else FP32 * 2 * ffn
    solved = min(width, limit)
    refit = FP32 * 2 * ffn + max(FP32 * solved**2 + at_once, refit_bytes(solved))
    local = FP32 * (1 + FIT_COPIES) * ffn + max(at_once, spare, trained_bytes(width, 0, local_batch))
    whole = FP32 * FIT_COPIES * layer + max(at_once, spare, trained_bytes(width, hidden, layer_batch))
    return max(rest + max(choice, refit, local if local_batch else 0), whole if layer_batch else 0)
