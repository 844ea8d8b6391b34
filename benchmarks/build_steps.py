"""What keeping blocks apart in a build is worth, by the number of tokens that each neuron is fitted to.

    python benchmarks/build_steps.py                    # 2,048, 8,192 and 49,152 tokens, two seeds: about ten minutes of one core
    python benchmarks/build_steps.py --tokens 2048 --seeds 0

examples/tiny-mixtral becomes a dense model of width 512 by `obs+refit+local` with 200 local steps and no heal. Two builds take turns
on the same text and seed:

* leaked: the elimination and the refit see all blocks, so the ridge and the step of the local fit are chosen on blocks that were
  fitted to. The ridge is then always the smallest, and the local fit is thrown away wherever it cannot beat an in-sample error.
* apart: what the package does. Nothing is fitted to the blocks that choose.

Judged by KL to the teacher on one block from each of --judged passages of the held-out split, which no build sees.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from recovery import one_block_per_passage, width_target
from torch import Tensor

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.student.build import layer as layers
from moe2dense.student.build.api import build_student
from moe2dense.student.build.state import BuildState
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.errors import relative_error, weights_by_size
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.refit import RIDGES, refit
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

ROOT = Path(__file__).parent.parent
INIT = "obs+refit+local"


def leaked_ffn(
    state: BuildState, layer_pass: LayerPass, index: int
) -> tuple[DenseFFN, LayerProvenance | None, dict[str, Any]]:
    """Make a layer's FFN as `build_ffn` does, but fit elimination and refit to all tokens, those that choose included."""
    x, target = layers.ffn_inputs_and_targets(state, layer_pass, index)
    weights = weights_by_size(layer_pass.hidden_out.reshape(-1, x.shape[1])[state.real_tokens])
    held_out = layers.held_out_tokens(state)
    with torch.no_grad():
        ffn, provenance = make_ffn(layers.task_of(state, layer_pass, x, target, weights), state.base)

        def error(candidate: DenseFFN) -> float:
            return relative_error(candidate, x[held_out], target[held_out], weights[held_out])

        fits = {ridge: refit(ffn, x, target, ridge, weights=weights) for ridge in RIDGES}
        ridge = min(fits, key=lambda r: error(fits[r]))
    ffn, record = layers.fit_ffn(state, fits[ridge], x, target, weights, index)
    return ffn, provenance, {"layer": index, "ridge": ridge, **record}


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Build in one of the two ways within the context."""
    if name == "leaked":
        with mock.patch.object(layers, "build_ffn", leaked_ffn):
            yield
    else:
        yield


def one_build(
    teacher: Teacher, name: str, data: Blocks, judge: Reference, seed: int, width: int, steps: int
) -> dict[str, Any]:
    """Build once; return the held-out KL, what the build chose in each layer, and its seconds."""
    begun, config = time.monotonic(), BuildConfig(local_steps=steps)
    with way(name):
        student = build_student(teacher, width_target(teacher, width), data, init=INIT, config=config, seed=seed)
    seconds = time.monotonic() - begun
    rows = [row for row in student.history if "local_best_step" in row]
    return {
        "kl": float(evaluate(student, judge, bootstrap=0).kl),
        "steps": [row["local_best_step"] for row in rows],
        "before": [row["local_before"] for row in rows],
        "ridges": [row["ridge"] for row in rows],
        "seconds": seconds,
    }


def shuffled(blocks: Blocks, tokens: int, seed: int) -> Blocks:
    """Return blocks of so many tokens in all, from many passages."""
    order: Tensor = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[: max(2, tokens // blocks.input_ids.shape[1])]]


def main() -> None:
    """Print a row for each number of tokens: medians over the seeds, their range, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 49152])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--judged", type=int, default=24)
    parser.add_argument("--data", default=str(ROOT / "examples" / "text"))
    args = parser.parse_args()
    teacher = load_teacher(ROOT / "examples" / "tiny-mixtral")
    tokenizer = teacher.tokenizer()
    text = load_blocks(args.data, tokenizer, args.block, "train")
    judge = reference(teacher, one_block_per_passage(args.data, "valid", tokenizer, args.block, args.judged))
    print(f"{INIT}, {args.steps} steps, width {args.width}; judged on {len(judge.blocks)} passages\n")
    print("| tokens | a neuron | KL, leaked | KL, apart | ratio | local steps kept, leaked | local steps kept, apart |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for tokens in args.tokens:
        results: dict[str, list[dict[str, Any]]] = {"leaked": [], "apart": []}
        for seed in args.seeds:
            data = shuffled(text, tokens, seed)
            for name, rows in results.items():
                rows.append(one_build(teacher, name, data, judge, seed, args.width, args.steps))
                print(f"<!-- {tokens} tokens, seed {seed}, {name}: {rows[-1]} -->", flush=True)
        kl = {name: [row["kl"] for row in rows] for name, rows in results.items()}
        middle = {name: statistics.median(values) for name, values in kl.items()}
        shown = [f"{middle[n]:.3f} ({min(kl[n]):.3f} to {max(kl[n]):.3f})" for n in results]
        steps = [", ".join(str(row["steps"]) for row in rows) for rows in results.values()]
        ratio = middle["apart"] / middle["leaked"]
        print(
            f"| {tokens:,} | {tokens / args.width:.0f} | {shown[0]} | {shown[1]} | {ratio:.2f} | {steps[0]} | {steps[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
