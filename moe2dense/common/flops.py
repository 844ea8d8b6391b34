"""FLOPs of every kind of product that a run makes: the counters of a run and the plan both count with these.

A multiplication and an addition are two FLOPs. Attention counts every pair of positions of a block, also those that a causal
mask hides, as torch's own counter does; what is not a matrix product (norms, softmax, activations) is left out.
"""

# n tokens, M width of an FFN, H hidden size, P neurons of a pool
BACKWARD = 2.0  # of a product whose both factors have a gradient, by the forward pass
ATTENTION_BACKWARD = 2.5  # fused attention computes its scores again
PANEL = 1024  # columns at once of a symmetric product


def product(rows: float, inner: float, columns: float) -> float:
    """Return the FLOPs of [rows, inner] @ [inner, columns]."""
    return 2.0 * rows * inner * columns


def gated_ffn(tokens: float, width: float, hidden: float) -> float:
    """Return the FLOPs of a gated FFN: gate, up and down."""
    return 3 * product(tokens, hidden, width)


def trained_ffn(tokens: float, width: float, hidden: float) -> float:
    """Return the FLOPs of a gated FFN with its gradients, where its inputs need none: all of down, the weights of gate and up."""
    return gated_ffn(tokens, width, hidden) + 4 * product(tokens, hidden, width)


def symmetric_product(size: int, inner: float) -> float:
    """Return the FLOPs of the lower half of a [size, inner] @ [inner, size], computed in panels of columns."""
    return sum(product(size - start, inner, min(PANEL, size - start)) for start in range(0, size, PANEL))


def gram(tokens: float, width: int, hidden: int) -> float:
    """Return the FLOPs of the Gram matrix of an FFN's neurons and their cross products with a target, activations included."""
    activations = 2 * product(tokens, hidden, width)
    return activations + symmetric_product(width, tokens) + product(width, tokens, hidden)


def cholesky(size: float) -> float:
    """Return the FLOPs of the Cholesky factor of [size, size]."""
    return size**3 / 3


def ridge_solve(width: float, hidden: float) -> float:
    """Return the FLOPs of one ridge solution of [width, hidden]: what the start misses, the factor, two triangular solutions."""
    return cholesky(width) + 2 * product(width, width, hidden)


def elimination(pool: int, hidden: int, width: int, step: int) -> float:
    """Return the FLOPs of eliminating neurons of a pool down to `width`, `step` at a time, without the Gram matrix.

    These are the factor, the solution, the inverse (two thirds of a cube), and for each step the columns of the inverse, the
    downdate of the weights, and the downdates of the inverse, which are carried out on what is still stored.
    """
    total = cholesky(pool) + product(pool, pool, hidden) + 2 * pool**3 / 3
    stored = left = pool
    most, waiting = max(32, min(512, pool // 16)), 0

    def settle() -> float:
        return symmetric_product(stored, waiting)

    while left > width:
        number = min(step, left - width)
        if waiting + number > most:
            total += settle()
            waiting = 0
        total += product(stored, waiting, number) + product(stored, number, hidden)
        if number > most:
            total += symmetric_product(stored, number)
        else:
            waiting += number
        left -= number
        if left < 0.8 * stored:
            total += settle()
            waiting, stored = 0, left
    return total


def elimination_by_tokens(tokens: int, pool: int, hidden: int, width: int, step: int) -> float:
    """Return the FLOPs of eliminating neurons of a pool by way of a kernel of fewer tokens, their activations included."""
    total = 2 * product(tokens, hidden, pool) + symmetric_product(tokens, pool) + cholesky(tokens)
    total += product(tokens, tokens, pool + hidden) / 2 + 2 * product(tokens, pool, hidden)
    stored = left = pool
    waiting = 0
    while left > width:
        number = min(step, left - width)
        total += product(stored, tokens + waiting, number) + product(stored, number, hidden)
        waiting += number
        left -= number
        if left < 0.8 * stored:
            stored = left
    return total


def ridge_by_tokens(tokens: float, judged: float, width: int, hidden: int, tries: int) -> float:
    """Return the FLOPs of a refit on matrices of few tokens: activations, what the start misses, the kernel, `tries` ridges, the solution."""
    rows = (tokens + judged) * (2 * product(1, hidden, width) + product(1, width, hidden))
    kernels = symmetric_product(int(tokens), width) + product(judged, width, tokens)
    each = cholesky(tokens) + product(tokens, tokens, hidden) + product(judged, tokens, hidden)
    return rows + kernels + tries * each + product(width, tokens, hidden)


def refined_ridge(width: float, hidden: float, corrections: int = 2) -> float:
    """Return the FLOPs of one ridge solution in float32 with corrections whose residuals are float64, each of two products."""
    return cholesky(width) + (2 + 2 * corrections) * product(width, width, hidden)


def sketched_ridge(width: float, hidden: float, sketch: float, tries: int) -> float:
    """Return the FLOPs of a ridge chosen on a sketch of the outputs, and of the solution with it."""
    # what the start misses is found once
    rough = refined_ridge(width, sketch, corrections=1) - product(width, width, sketch)
    shared = product(width, hidden, 2 * sketch) + product(width, width, sketch)
    return shared + tries * rough + refined_ridge(width, hidden)


def head_loss(tokens: float, hidden: float, vocabulary: float, trains_head: bool = True) -> float:
    """Return the FLOPs of a loss over the vocabulary: logits, the gradient of the states and, where it trains, of the head."""
    return (3 if trains_head else 2) * product(tokens, hidden, vocabulary)
