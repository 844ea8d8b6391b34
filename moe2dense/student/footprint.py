"""Count the bytes that building a student takes. No torch here: the plan and the build count the same way."""

import math

# T tokens, H hidden, M student FFN width, P pool of neurons
FP32 = 4
FIT_COPIES = 5  # weights, gradients, two Adam moments, the best values so far
# [T, H] of the student while a layer is built: hidden states, FFN inputs and targets, and what these are computed from
STATE_COPIES = 5


def hint_layers(layers: int, each: int, budget: int) -> range:
    """Return the layers whose teacher states, of `each` bytes, the heal follows: all but the last, or evenly spaced ones that fit."""
    most = min(layers - 1, budget // max(each, 1))
    return range(-(-layers // (most + 1)) - 1, layers - 1, -(-layers // (most + 1))) if most > 0 else range(0)


def pool_bytes(pool: int, hidden: int) -> int:
    """Return the memory of eliminating neurons of a pool.

    These are the Gram matrix, its factor and inverse and one to spare, the neurons and their outputs.
    """
    return FP32 * (4 * pool**2 + 6 * pool * hidden)


def pool_limit(budget: int, width: int, hidden: int = 0) -> int:
    """Return the most neurons whose elimination fits in `budget` bytes; never fewer than `width`."""
    b, c = 6 * hidden, max(budget, 0) // FP32
    return max(width, (math.isqrt(b * b + 16 * c) - b) // 8)


def refit_bytes(width: int) -> int:
    """Return the memory of the refit's Gram matrix in float32 and of its float64 copy and factor."""
    return (FP32 + 2 * 8) * width**2


def refit_limit(budget: int) -> int:
    """Return the most neurons whose refit's matrices fit in `budget` bytes."""
    return max(1, math.isqrt(max(budget, 0) // (FP32 + 2 * 8)))


def rows_at_once(width: int) -> int:
    """Return how many tokens' activations are computed at once: some 64 MB of them, 256 to 8192 tokens."""
    return max(256, min(8192, 16_000_000 // max(width, 1)))


def activation_bytes(width: int, tokens: int) -> int:
    """Return the memory of neurons' activations of the tokens that pass an FFN at once.

    These are gate, up, the activated gate and their product.
    """
    return 4 * FP32 * width * min(rows_at_once(width), tokens)


def trained_bytes(width: int, hidden: int, batch: int) -> int:
    """Return the memory of activations of `batch` tokens and their gradients; hidden > 0 counts attention and norms too."""
    return FP32 * batch * (7 * width + 16 * hidden)


def layer_bytes(
    layer: int, ffn: int, width: int, hidden: int, pool: int, tokens: int, limit: int, local_batch: int = 0, layer_batch: int = 0
) -> int:  # fmt: skip
    """Return the most memory that building one layer takes, apart from hidden states.

    layer, ffn: parameters of the layer and of its FFN. pool: neurons to choose from. limit: neurons refitted at once. The
    batches are in tokens, 0 where there is no such fit. It is the largest of the choice of neurons, the refit and the fits.
    A fit's optimiser works on one tensor at a time, for which it takes two more of that size.
    """
    rest, at_once, spare = FP32 * (layer - ffn), activation_bytes(width, tokens), FP32 * 2 * width * hidden
    choice = pool_bytes(pool, hidden) + activation_bytes(pool, tokens) if pool > width else FP32 * 2 * ffn
    solved = min(width, limit)
    refit = FP32 * 2 * ffn + max(FP32 * solved**2 + at_once, refit_bytes(solved))
    local = FP32 * (1 + FIT_COPIES) * ffn + max(at_once, spare, trained_bytes(width, 0, local_batch))
    layer_fit = FP32 * FIT_COPIES * layer + max(at_once, spare, trained_bytes(width, hidden, layer_batch))
    return max(rest + max(choice, refit, local if local_batch else 0), layer_fit if layer_batch else 0)
