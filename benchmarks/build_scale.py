"""Time and peak memory of building one layer's FFN as teachers grow: energies, Gram matrix, elimination, refit.

    python benchmarks/build_scale.py                        # four sizes, up to 128 experts of width 768, within 2 GB: a few minutes
    python benchmarks/build_scale.py --memory 500MB --sizes 64x512x1024x2048,...

Each size is experts x expert width x hidden size x student width; experts are made when they are read (`read s`), as a streamed teacher's are. The
pool of neurons that the elimination works on is cut to what `--memory` holds, so the Gram matrix of all neurons exists only where it fits. Each
size runs in a process of its own, so that peaks are its own; they hold the layer's tokens' inputs and targets too.
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
from moe2dense.student.footprint import pool_limit
from moe2dense.student.methods import Block, make_ffn
from moe2dense.student.types import DenseFFN
from moe2dense.teacher.capture import LayerStats
from moe2dense.units import parse_bytes, show_bytes

SIZES = "8x256x192x512,32x256x512x1024,64x512x1024x2048,128x768x2048x6144"


class Made:
    """Experts that exist only while they are used."""

    def __init__(self, count: int, width: int, hidden: int):
        self.count, self.width, self.hidden, self.seconds = count, width, hidden, 0.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, e: int) -> DenseFFN:
        begun = time.monotonic()
        made = random_ffn(self.width, self.hidden, self.hidden**-0.5, seed=e)
        self.seconds += time.monotonic() - begun
        return made


def measure(size: str, memory: int, tokens: int) -> tuple[float, ...]:
    """(neurons, pool, bytes of its Gram matrix, seconds of reading, of the choice and of the refit, peak bytes above the start, relative error)."""
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
        expert = experts[e]
        h = expert.hidden(x[rows])
        target[rows] += h @ expert.down.T / routed.shape[1]
        stats.neuron_energy[e] += h.pow(2).sum(0).double() / routed.shape[1] ** 2
        stats.weight[e] += len(rows) / routed.shape[1]
        stats.count[e] += len(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = min(pool_limit(memory, dense, hidden), count * width)
    experts.seconds = 0.0
    block = Block(dense, hidden, x, target, [], experts, stats, config=WalkConfig(), pool_limit=limit)
    begun = time.monotonic()
    ffn, _ = make_ffn(block, "obs")
    chosen = time.monotonic()
    ffn = refit(ffn, x, target)
    done = time.monotonic()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    read, error = experts.seconds, relative_error(ffn, x, target)
    return count * width, limit, 4 * limit**2, read, chosen - begun - read, done - chosen, peak, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--memory", default="2GB", help="for the elimination's matrices")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    memory = parse_bytes(args.memory)
    print(
        f"{'E x F x H -> M':>20} {'neurons':>8} {'pool':>6} {'Gram':>7} {'read s':>7} {'choose s':>9} {'refit s':>8} {'peak':>7} {'error':>6}"
    )
    for size in args.sizes.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            neurons, kept, gram, read, choose, fit, peak, error = pool.apply(measure, (size, memory, args.tokens))
        print(
            f"{size:>20} {neurons:8.0f} {kept:6.0f} {show_bytes(gram):>7} {read:7.1f} {choose:9.1f} {fit:8.1f} {show_bytes(peak):>7} "
            f"{error:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
