"""Time and peak memory of building one layer's FFN as teachers grow: energies, Gram matrix, elimination, refit.

    python benchmarks/build_scale.py [--memory 500MB] [--sizes 8x256x192x512,16x512x512x1024,...]

Each size is experts x expert width x hidden size x student width; experts are made when they are read, as a streamed teacher's are. The pool of
neurons that the elimination works on is cut to what `--memory` holds; each size runs in a process of its own, so that peaks are its own.
"""

import argparse
import multiprocessing
import resource
import time

import torch

from moe2dense.config import WalkConfig
from moe2dense.student.ffn.local import relative_error
from moe2dense.student.ffn.randomized import random_ffn
from moe2dense.student.ffn.refit import refit
from moe2dense.student.methods import Block, make_ffn, pool_limit
from moe2dense.student.types import DenseFFN
from moe2dense.teacher.capture import LayerStats
from moe2dense.units import parse_bytes, show_bytes

SIZES = "8x256x192x512,8x1024x512x1024,64x256x512x1024,128x256x1024x2048"


class Made:
    """Experts that exist only while they are used."""

    def __init__(self, count: int, width: int, hidden: int):
        self.count, self.width, self.hidden = count, width, hidden

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, e: int) -> DenseFFN:
        return random_ffn(self.width, self.hidden, self.hidden**-0.5, seed=e)


def measure(size: str, memory: int, tokens: int) -> tuple[float, ...]:
    """(neurons, pool, seconds of the choice, seconds of the refit, peak bytes above the start, relative error)."""
    torch.manual_seed(0)
    count, width, hidden, dense = (int(n) for n in size.split("x"))
    experts = Made(count, width, hidden)
    x = torch.randn(tokens, hidden)
    routed = torch.rand(tokens, count).topk(min(4, count), 1).indices
    target, stats = torch.zeros(tokens, hidden), LayerStats.zeros(count, hidden, width)
    stats.tokens += tokens
    assert stats.neuron_energy is not None
    for e in range(count):  # what the teacher's pass over the layer gives
        rows = (routed == e).any(1).nonzero()[:, 0]
        h = experts[e].hidden(x[rows])
        target[rows] += h @ experts[e].down.T / routed.shape[1]
        stats.neuron_energy[e] += h.pow(2).sum(0).double() / routed.shape[1] ** 2
        stats.weight[e] += len(rows) / routed.shape[1]
        stats.count[e] += len(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = pool_limit(memory, dense)
    block = Block(dense, hidden, x, target, [], experts, stats, config=WalkConfig(), pool_limit=limit)
    begun = time.monotonic()
    ffn, _ = make_ffn(block, "obs")
    chosen = time.monotonic()
    ffn = refit(ffn, x, target)
    done = time.monotonic()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return count * width, min(limit, count * width), chosen - begun, done - chosen, peak, relative_error(ffn, x, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--memory", default="500MB", help="for the elimination's matrices")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    memory = parse_bytes(args.memory)
    print(f"{'E x F x H -> M':>24} {'neurons':>8} {'pool':>6} {'choose s':>9} {'refit s':>8} {'peak':>9} {'error':>6}")
    for size in args.sizes.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            neurons, kept, choose, fit, peak, error = pool.apply(measure, (size, memory, args.tokens))
        print(
            f"{size:>24} {neurons:8.0f} {kept:6.0f} {choose:9.1f} {fit:8.1f} {show_bytes(peak):>9} {error:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
