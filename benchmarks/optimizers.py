"""Quality and memory of the ways to train that hold less, against AdamW in float32: the example's student, several seeds.

    python benchmarks/optimizers.py --student out/demo/build/student --tokens 65k --seeds 3

Every way trains the same built student on the same text and targets (computed once); the table has the held-out KL after training, as
median, lowest and highest over the seeds, its ratio to AdamW's, and seconds.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch

from moe2dense.common.units import parse_count
from moe2dense.config.training import TrainConfig
from moe2dense.data.load import load_blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.student.build.api import build_student
from moe2dense.student.store import load_student
from moe2dense.teacher.load import load_teacher

WAYS = {
    "AdamW, float32": {"optimizer": "adamw"},
    "AdamW 8 bits, float32": {"optimizer": "adamw-8bit"},
    "AdamW, bfloat16": {"optimizer": "adamw", "weights": "bfloat16"},
    "AdamW 8 bits, bfloat16": {"optimizer": "adamw-8bit", "weights": "bfloat16"},
    "  in backward": {"optimizer": "adamw-8bit", "weights": "bfloat16", "step_in_backward": True},
    "Adafactor, bfloat16": {"optimizer": "adafactor", "weights": "bfloat16", "step_in_backward": True},
    "offload, bfloat16": {"optimizer": "adamw", "offload": True, "weights": "bfloat16", "step_in_backward": True},
    "Muon, float32": {"optimizer": "muon"},
    "AdamW, cooldown 0.2": {"optimizer": "adamw", "cooldown": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="examples/tiny-mixtral")
    parser.add_argument("--text", default="examples/text")
    parser.add_argument("--student", default="", help="a built student; made with obs+refit where none is named")
    parser.add_argument("--tokens", default="65k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", default="", help="only these, by name, joined with ;")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(args.teacher)
    tokenizer = teacher.tokenizer()
    train = load_blocks(args.text, tokenizer, 256, "train", tokens=parse_count(args.tokens))
    valid = load_blocks(args.text, tokenizer, 256, "valid", tokens=24 * 256, spread=True)
    built = (
        load_student(Path(args.student)) if args.student else build_student(teacher, "3.2m", train[:64], "obs+refit")
    )
    targets, held_out = hidden_targets(teacher, train), hidden_targets(teacher, valid)
    chosen = [name.strip() for name in args.ways.split(";") if name.strip()]
    ways = {name: options for name, options in WAYS.items() if not chosen or name.strip() in chosen}
    kl: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(args.seeds):
        for name, options in ways.items():
            student, begun = copy.deepcopy(built), time.perf_counter()
            config = TrainConfig(eval_every=10_000, features="", **options)
            result = distill(
                student, data=train, targets=targets, valid=valid, valid_targets=held_out, config=config, seed=seed
            )
            kl[name].append(result.history[-1]["valid_kl"])
            seconds[name].append(time.perf_counter() - begun)
            print(f"seed {seed} {name}: {kl[name][-1]:.4f} in {seconds[name][-1]:.0f} s", flush=True)
    base = statistics.median(next(iter(kl.values())))
    print(f"{'':>24} {'KL':>7} {'low':>7} {'high':>7} {'ratio':>6} {'s':>6}")
    for name, values in kl.items():
        middle = statistics.median(values)
        print(
            f"{name:>24} {middle:7.4f} {min(values):7.4f} {max(values):7.4f} {middle / base:6.3f} {statistics.median(seconds[name]):6.0f}"
        )


if __name__ == "__main__":
    main()
