"""What a plan says next to what the run counted, stage by stage; and what counting costs.

    python benchmarks/scale.py                     # a short conversion of the example: FLOPs, bytes read, memory, time
    python benchmarks/scale.py run OUT             # the same table for a finished run on this machine
    python benchmarks/scale.py counting            # seconds of a training step: without counters, with them, under torch's own counter
    python benchmarks/scale.py training            # rehearsed and measured memory of training steps, each in a process of its own

Ratios are plan / run. Memory is above what the process held when the stage began.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig

import moe2dense as m2d
from moe2dense.common.costs import Cost
from moe2dense.common.counters import metered
from moe2dense.common.units import show_bytes, show_flops
from moe2dense.config.toml import read_config
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.planning import make_plan
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.objective import Objective
from moe2dense.distillation.rehearsal import rehearse
from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling import forward
from moe2dense.modeling.head import Head
from moe2dense.modeling.shape import Geometry

EXAMPLE = "examples/tiny-mixtral"
SHORT = """
[data]
eval_blocks = 16
[build]
min_tokens = 16384
local_steps = 60
heal_epochs = 4.0
[train]
tokens = 65536
[evaluate]
samples = 0
"""
TRAINING = {
    "as it is": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16, 8 bits": {"gradient_checkpointing": True, "weights": "bfloat16", "optimizer": "adamw-8bit"},
    "  and in backward": {
        "gradient_checkpointing": True, "weights": "bfloat16", "optimizer": "adamw-8bit", "step_in_backward": True,
    },
    "Adafactor": {
        "gradient_checkpointing": True, "weights": "bfloat16", "optimizer": "adafactor", "step_in_backward": True,
    },
    "adapters": {"lora": 16},
}  # fmt: skip


def compare(out: Path) -> None:
    """Print plan and run of every stage."""
    plan = make_plan(read_config(out / "moe2dense.toml"))
    counted = {name: Cost(**entry) for name, entry in json.loads((out / "run.json").read_text())["cost"].items()}
    print(
        f"{'stage':>15} | {'FLOPs: run':>12} {'ratio':>6} | {'read: run':>9} {'ratio':>6} | {'memory: run':>11} {'ratio':>6} | {'s: run':>7} {'plan':>7}"
    )
    for name, cost in counted.items():
        stage = plan.stages[name]
        flops, memory = sum(cost.flops.values()), cost.memory - cost.began
        print(
            f"{name:>15} | {show_flops(flops):>12} {stage.all_flops / max(flops, 1):6.2f} | {show_bytes(cost.disk):>9} "
            f"{stage.read / max(cost.disk, 1):6.2f} | {show_bytes(memory):>11} {stage.memory / max(memory, 1):6.2f} | "
            f"{cost.seconds:7.1f} {stage.seconds:7.1f}"
        )
    whole = sum(sum(cost.flops.values()) for cost in counted.values())
    read = sum(cost.disk for cost in counted.values())
    print(
        f"all: FLOPs {plan.flops / whole:.3f}, bytes read {sum(s.read for s in plan.stages.values()) / read:.3f} of the run's"
    )


def convert(model: str, to: str) -> None:
    """Convert the example shortly and compare."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "short.toml"
        config.write_text(SHORT)
        m2d.convert(model, to=to, out=Path(folder) / "run", config=config)
        compare(Path(folder) / "run")


def counting(rounds: int) -> None:
    """Time a training step of a small student in three ways, alternating."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3
    )  # fmt: skip
    objective = Objective(AutoModelForCausalLM.from_config(config))
    ids, rows = torch.randint(0, 4096, (2, 256)), HiddenRows(torch.randn(512, 192), Head(torch.randn(4096, 192)))

    def step() -> float:
        begun = time.perf_counter()
        objective({"input_ids": ids}, rows, denominator=512.0, label_denominator=512.0)[0].backward()
        return time.perf_counter() - begun

    ways = {
        "no counters": lambda: mock.patch.object(forward, "body_products", return_value=mock.Mock(trained=0)),
        "counters": nullcontext,
        "torch's counter": lambda: FlopCounterMode(display=False),
    }
    silent = mock.patch.object(forward, "count_pass")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with way(), silent if name == "no counters" else nullcontext():
                seconds[name].append(step())
    base = statistics.median(seconds["no counters"])
    for name, values in seconds.items():
        spread = statistics.quantiles(values, n=4)
        print(
            f"{name:>16}: {1e3 * statistics.median(values):7.2f} ms ({1e3 * spread[0]:.2f} to {1e3 * spread[2]:.2f}), {statistics.median(values) / base:.3f}"
        )


def training_memory(name: str, hidden: int, width: int, layers: int) -> tuple[int, int]:
    """Return (rehearsed, measured) bytes of two training steps."""
    torch.set_num_threads(1)
    sizes = dict(vocab_size=8192, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers)
    config = MistralConfig(**sizes, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    train = TrainConfig(batch=2048, micro_batch=8, lr=1e-4, features="", **TRAINING[name])
    teacher = Geometry("mixtral", layers, (), hidden, 8192, 1, 1, width, 0, 0, 1, 1, 1, 512)
    planned = rehearse(config, teacher, train, 512).peak
    model = AutoModelForCausalLM.from_config(config)
    text = Blocks(torch.randint(0, 8192, (16, 512)))
    targets = HiddenTargets(torch.randn(16, 512, hidden).bfloat16(), Head(torch.randn(8192, hidden)))
    small = TrainConfig(batch=16, lr=1e-4, features="", **TRAINING[name])
    distill(model, data=text[:1], targets=targets[:1], config=small)  # loads what a first step loads
    weights = sum(p.nbytes for p in model.parameters())
    with metered() as cost:
        distill(model, data=text, targets=targets, config=train)
    return planned, cost.memory - cost.began + weights


def training(hidden: int, width: int, layers: int) -> None:
    """Print a row for each way to train."""
    print(f"{'training':>18} {'rehearsed':>10} {'measured':>10} {'ratio':>6}")
    for name in TRAINING:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            planned, measured = pool.apply(training_memory, (name, hidden, width, layers))
        print(f"{name:>18} {show_bytes(planned):>10} {show_bytes(measured):>10} {planned / measured:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="convert", choices=["convert", "run", "counting", "training"])
    parser.add_argument("out", nargs="?", default="", help="folder of a finished run")
    parser.add_argument("--model", default=EXAMPLE)
    parser.add_argument("--to", default="3.2m")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sizes", default="512x1408x8", help="hidden size x width x layers of the student that trains")
    args = parser.parse_args()
    match args.what:
        case "convert":
            convert(args.model, args.to)
        case "run":
            compare(Path(args.out))
        case "counting":
            counting(args.rounds)
        case _:
            training(*(int(n) for n in args.sizes.split("x")))


if __name__ == "__main__":
    main()
