"""Choosing a layer's neurons and refitting them: CPU seconds of the direct way in full precision and of ours, and how far apart they end.

    python benchmarks/scale_build.py                 # a quarter of a real layer in every direction: two minutes on one core
    python benchmarks/scale_build.py --share 1       # hidden 4096, width 14336 of a pool of 20000, 6000 tokens: 10 GB and half an hour
    python benchmarks/scale_build.py --tokens 3      # three times as many tokens, which is more than there are neurons

Both are run in turn, `--repeat` times. elimination: of a pool with its Gram matrix, against working on matrices of tokens where these
are fewer. refit: the same search for a ridge, each solved in float64 for all outputs, against what `refit_by_held_out` does.
The layer's inputs have a spectrum that falls as 1/i, so that its Gram matrices are as badly conditioned as those of trained models.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moe2dense.student.ffn import ridge
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.obs import eliminate, eliminate_by_tokens
from moe2dense.student.ffn.randomized import random_ffn
from moe2dense.student.ffn.refit import FIRST_RIDGE, choose_ridge, grams, refit_by_held_out

Result = TypeVar("Result")

HIDDEN, WIDTH, POOL, TOKENS = 4096, 14336, 20_000, 6000


def layer(share: float, tokens: float) -> tuple[DenseFFN, Tensor, Tensor, int]:
    """Return (a pool of neurons, inputs [T, H], targets [T, H], the width to reach)."""
    torch.manual_seed(0)
    hidden, width, pool, count = (round(share * n) for n in (HIDDEN, WIDTH, POOL, TOKENS * tokens))
    spectrum = torch.arange(1, hidden + 1).float().pow(-0.5)
    mix = torch.linalg.qr(torch.randn(hidden, hidden))[0]
    x = torch.randn(count, hidden) * spectrum @ mix * (hidden / spectrum.pow(2).sum()).sqrt()
    ffn = random_ffn(pool, hidden, hidden**-0.5)
    return ffn, x, ffn(x) * 0.5 + random_ffn(pool // 4, hidden, hidden**-0.5, seed=1)(x), width


def whole(ffn: DenseFFN, x: Tensor, target: Tensor, width: int, step: int) -> Tensor:
    """Eliminate with the pool's Gram matrix."""
    gram, cross = grams(ffn, x, target)
    return eliminate(gram, cross, ffn.down.T.clone(), width, 0.1, step, overwrite=True)


def by_tokens(ffn: DenseFFN, x: Tensor, target: Tensor, width: int, step: int) -> Tensor:
    """Eliminate with matrices of tokens."""
    return eliminate_by_tokens(ffn.hidden(x), target, ffn.down.T, width, 0.1, step)


def in_double(ffn: DenseFFN, x: Tensor, target: Tensor, held_out: Tensor) -> DenseFFN:
    """Refit with the ridge that is best on held-out tokens, sought as a build seeks it, each solved in float64 for all outputs."""
    products = grams(ffn, x[~held_out], target[~held_out])

    @functools.cache
    def fitted(strength: float) -> DenseFFN:
        down = ridge._solve_double(*products, ffn.down.T, strength).T.contiguous()
        return DenseFFN(ffn.gate, ffn.up, down, gating=ffn.gating)

    best, _ = choose_ridge(lambda r: relative_error(fitted(r), x[held_out], target[held_out]), FIRST_RIDGE)
    return fitted(best)


def ours(ffn: DenseFFN, x: Tensor, target: Tensor, held_out: Tensor) -> DenseFFN:
    """Refit as a build does."""
    return refit_by_held_out(ffn, x, target, held_out).ffn


def timed(*ways: Callable[[], Result], repeat: int) -> tuple[list[list[float]], list[Result]]:
    """Return the CPU seconds of each way, run in turn, and their last results."""
    seconds: list[list[float]] = [[] for _ in ways]
    results: list[Result] = []
    for _ in range(repeat):
        results = []
        for number, way in enumerate(ways):
            begun = time.process_time()
            results.append(way())
            seconds[number].append(time.process_time() - begun)
    return seconds, results


def show(name: str, seconds: list[list[float]], agreement: str) -> None:
    """Print one row: medians, spread and ratio."""
    direct, new = (statistics.median(s) for s in seconds)
    spread = max(max(s) / min(s) - 1 for s in seconds)
    print(
        f"{name:12s} {direct:9.2f} s {new:9.2f} s {direct / new:7.2f} x   spread {spread:4.0%}   {agreement}",
        flush=True,
    )


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1 / 4)
    parser.add_argument("--tokens", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    ffn, x, target, width = layer(options.share, options.tokens)
    step = max(1, ffn.width // 256)
    print(f"pool {ffn.width}, width {width}, hidden {x.shape[1]}, tokens {len(x)}, {torch.get_num_threads()} threads")
    print(f"{'':12s} {'direct':>11s} {'ours':>11s} {'ratio':>9s}")
    keep = torch.arange(width)
    if len(x) < 0.7 * ffn.width:
        seconds, neurons = timed(
            lambda: whole(ffn, x, target, width, step),
            lambda: by_tokens(ffn, x, target, width, step),
            repeat=options.repeat,
        )
        first, second = (set(k.tolist()) for k in neurons)
        keep = torch.tensor(sorted(second))
        show("elimination", seconds, f"{len(first & second) / width:.2%} of the neurons are the same")
    narrow = dense(ffn, rows=keep)
    held_out = torch.arange(len(x)) % 10 == 0
    seconds, fitted = timed(
        lambda: in_double(narrow, x, target, held_out), lambda: ours(narrow, x, target, held_out), repeat=options.repeat
    )
    errors = [relative_error(f, x[held_out], target[held_out]) for f in fitted]
    show("refit", seconds, f"held-out errors {errors[0]:.6f} and {errors[1]:.6f}")


if __name__ == "__main__":
    main()
