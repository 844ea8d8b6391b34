"""Time and peak memory of building one layer's FFN as teachers grow: energies, Gram matrix, elimination, refit.

    python benchmarks/build_scale.py                        # four sizes, up to 128 experts of width 768, within 2 GB: a few minutes
    python benchmarks/build_scale.py --memory 500MB --sizes 64x512x1024x2048,...
    python benchmarks/build_scale.py build                   # peak memory of whole builds next to the plan's number: a minute

Each size is experts x expert width x hidden size x student width; experts are generated when they are read (`read s`), as a streamed teacher's are. The
pool of neurons that the elimination works on is cut to what `--memory` holds (never below the student's width, with which nothing is eliminated),
and a refit of more neurons than it holds is done in groups, so no Gram matrix exists that does not fit. Each
size runs in a process of its own, so that peaks are its own; they hold the layer's tokens' inputs and targets too.

`build` builds whole students layer by layer, on disk, from teachers of layers x experts x expert width x hidden size -> student width, and prints the
process's peak of anonymous memory (its own, not files it has mapped) above where it stood before, next to what the plan says of the same build.
"""

import argparse
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.common.units import parse_bytes, show_bytes
from moe2dense.config.schema import BuildConfig, RunConfig
from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import student_host
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_to_folder
from moe2dense.student.build.cost import build_bytes
from moe2dense.student.build.heal_memory import heal_bytes, heal_settings
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.randomized import random_ffn
from moe2dense.student.ffn.refit import refit
from moe2dense.student.ffn.task import FFNTask
from moe2dense.student.footprint import pool_limit, refit_limit
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import LayerStats

SIZES = "8x256x192x512,32x256x512x1024,64x512x1024x2048,128x768x2048x6144"
BUILDS = "6x8x512x256x1024,24x8x512x256x1024,4x4x1024x512x3072"


class GeneratedExperts:
    """Experts that exist only while they are used."""

    def __init__(self, count: int, width: int, hidden: int):
        self.count, self.width, self.hidden, self.seconds = count, width, hidden, 0.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, e: int) -> DenseFFN:
        begun = time.monotonic()
        ffn = random_ffn(self.width, self.hidden, self.hidden**-0.5, seed=e)
        self.seconds += time.monotonic() - begun
        return ffn


def measure(size: str, memory: int, tokens: int) -> tuple[float, ...]:
    """Return (neurons, pool, bytes of its Gram matrix, seconds of reading, of the choice and of the refit, peak bytes above the start, relative error)."""
    torch.manual_seed(0)
    count, width, hidden, dense = (int(n) for n in size.split("x"))
    experts = GeneratedExperts(count, width, hidden)
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
    task = FFNTask(dense, hidden, x, target, [], experts, stats, config=BuildConfig(), pool_limit=limit)
    begun = time.monotonic()
    ffn, _ = make_ffn(task, "obs")
    chosen = time.monotonic()
    ffn = refit(ffn, x, target, limit=refit_limit(memory))
    done = time.monotonic()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    read, error = experts.seconds, relative_error(ffn, x, target)
    return count * width, limit, 4 * limit**2, read, chosen - begun - read, done - chosen, peak, error


class AnonymousPeak(threading.Thread):
    """Measure the most anonymous memory of this process above where it stood, looked at every few milliseconds (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = self.before = self.now()
        self.ended = threading.Event()
        self.start()

    @staticmethod
    def now() -> int:
        """Return the bytes now."""
        rows = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(row for row in rows if row.startswith("RssAnon")).split()[1])

    def run(self) -> None:
        while not self.ended.wait(0.003):
            self.most = max(self.most, self.now())

    def end(self) -> int:
        """Stop, and return the most bytes above the start."""
        self.ended.set()
        self.join()
        return self.most - self.before


def write_teacher(folder: str, layers: int, experts: int, width: int, hidden: int) -> None:
    """Write a Mixtral with random weights."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=512, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=min(2, experts), max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure_build(folder: str, dense: int, memory: str, tokens: int) -> tuple[int, int, int, float]:
    """Return (bytes of the student, what the plan says of its build, peak bytes of the build above the start, seconds); few steps, all of them."""
    torch.set_num_threads(1)
    teacher = load_teacher(folder, memory=memory, experts="streamed", device="cpu")
    assert teacher.card is not None
    card, shape = student_host("mistral"), teacher_geometry(teacher.config, teacher.card)
    config = dense_config(teacher.config, card, dense)
    target = Target("build", "build", card, dense, config, count_parameters(empty_model(config)), shape)
    text = Blocks(torch.randint(0, 512, (tokens // 128, 128), generator=torch.Generator().manual_seed(0)))
    build = BuildConfig(local_steps=4, local_batch=256, layer_steps=3, layer_batch=512)
    heal = heal_settings(build, target, 128, teacher.budget, on_gpu=False)
    healing = heal_bytes(heal, target, 128, on_gpu=False) if heal is not None else 0
    plan = build_bytes(RunConfig(build=build), shape, target, tokens, teacher.budget, heal, healing)
    with tempfile.TemporaryDirectory() as out:
        begun, peak = time.monotonic(), AnonymousPeak()
        build_to_folder(teacher, target, text, Path(out) / "build" / "student", Path(out) / "build", config=build)
        return 4 * target.parameters, plan, peak.end(), time.monotonic() - begun


def builds(sizes: str, memory: str, tokens: int) -> None:
    """Print a row for each build."""
    spawn = multiprocessing.get_context("spawn")
    print(f"{'L x E x F x H -> M':>22} {'student':>8} {'plan':>8} {'peak':>8} {'seconds':>8}")
    for size in sizes.split(","):
        layers, experts, width, hidden, dense = (int(n) for n in size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            with spawn.Pool(1) as pool:
                pool.apply(write_teacher, (folder, layers, experts, width, hidden))
            with spawn.Pool(1) as pool:
                student, plan, peak, seconds = pool.apply(measure_build, (folder, dense, memory, tokens))
        print(
            f"{size:>22} {show_bytes(student):>8} {show_bytes(plan):>8} {show_bytes(peak):>8} {seconds:8.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="layer", choices=["layer", "build"])
    parser.add_argument("--sizes", default="")
    parser.add_argument("--memory", default="", help="for the elimination's matrices (2GB), or for a build (60MB)")
    parser.add_argument("--tokens", type=int, default=0, help="8192 for a layer, 2048 for a build")
    args = parser.parse_args()
    if args.what == "build":
        builds(args.sizes or BUILDS, args.memory or "60MB", args.tokens or 2048)
        return
    memory, tokens = parse_bytes(args.memory or "2GB"), args.tokens or 8192
    print(
        f"{'E x F x H -> M':>20} {'neurons':>8} {'pool':>6} {'Gram':>7} {'read s':>7} {'choose s':>9} {'refit s':>8} {'peak':>7} {'error':>6}"
    )
    for size in (args.sizes or SIZES).split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            neurons, pool_size, gram, read, choose, fit, peak, error = pool.apply(measure, (size, memory, tokens))
        print(
            f"{size:>20} {neurons:8.0f} {pool_size:6.0f} {show_bytes(gram):>7} {read:7.1f} {choose:9.1f} {fit:8.1f} {show_bytes(peak):>7} "
            f"{error:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
