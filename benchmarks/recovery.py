"""What each way of making a student is worth: KL and NLL before training, and at equal total teacher tokens after it.

    python benchmarks/recovery.py                                  # random, concat and the build before training, one seed
    python benchmarks/recovery.py --methods layerwise,concat --budgets 49152,491520 --epochs 5 --data FOLDER
    python benchmarks/recovery.py --methods all --widths 256,512,1024 --seeds 0,1,2 --budgets 49152,491520 --data FOLDER
    python benchmarks/recovery.py --sibling 4915200 --data FOLDER  # a dense model of the student's shape, trained from scratch

Teacher tokens count every position the teacher was run on, the build's included; replays of the same positions are free. Text is judged in one
block from each passage. Each budget starts from the same built student and trains on the first blocks of the same text.

What was measured with it, and what won and lost on the way: docs/students.md.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.config.schema import BuildConfig, RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.config.training import AUTO_FEATURES, TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.data.records import passages
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.student.build.api import build_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

ROOT = Path(__file__).parent.parent
ALL = (
    "random", "average", "weighted-average", "aligned-average", "svd", "concat", "cluster", "select", "select+refit", "obs+refit",
    "random+local", "concat+refit+local", "obs+refit+local", "obs+refit+local+layer", "layerwise",
)  # fmt: skip


def one_block_per_passage(
    folder: str, split: str, tokenizer: PreTrainedTokenizerBase, block: int, count: int
) -> Blocks:
    """Return the first `block` tokens of each of `count` passages that are long enough."""
    rows: list[list[int]] = []
    for record in passages(folder, split, 0):
        ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= block:
            rows.append(ids[:block])
        if len(rows) == count:
            break
    return Blocks(torch.tensor(rows))


def width_target(teacher: Teacher, width: int) -> Target:
    """Return the teacher's dense host with an FFN of `width` neurons."""
    base = resolve_target("50%", teacher.config, teacher.card)
    config = dense_config(teacher.config, base.card, width)
    return dataclasses.replace(base, to=f"M={width}", label=f"M={width}", width=width, config=config)


def judge(model: Student | PreTrainedModel, texts: dict[str, Reference]) -> dict[str, float]:
    """Return {'valid KL', 'valid NLL', ...} in nats per token."""
    numbers: dict[str, float] = {}
    for name, ref in texts.items():
        scores = evaluate(model, ref, bootstrap=10)
        numbers |= {f"{name} KL": float(scores.kl), f"{name} NLL": float(scores.nll)}
    return numbers


def train(
    student: Student | PreTrainedModel, data: Blocks, targets: Any, budget: int, config: TrainConfig, seed: int
) -> None:
    """Distil on the first `budget` tokens of the text."""
    config = dataclasses.replace(config, tokens=budget, eval_every=10**9, save_every=10**9)
    part = slice(0, max(1, budget // data.input_ids.shape[1]))
    distill(student, data=data[part], targets=targets[part], config=config, seed=seed)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every row of the table; each is printed when it is known."""
    teacher = load_teacher(args.teacher)
    tokenizer = teacher.tokenizer()
    texts = {
        s: reference(teacher, one_block_per_passage(args.data, s, tokenizer, args.block, 96)) for s in ("valid", "ood")
    }
    budgets = [int(b) for b in args.budgets.split(",") if b]
    seeds, widths = ([int(n) for n in text.split(",")] for text in (args.seeds, args.widths))
    methods = ALL if args.methods == "all" else args.methods.split(",")
    print(f"teacher NLL: {', '.join(f'{n} {judge_teacher(r):.3f}' for n, r in texts.items())}", flush=True)
    text = load_blocks(args.data, tokenizer, args.block, "train")
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        data = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))]  # from many passages
        data = data[: max([*budgets, args.build_tokens]) // args.block]
        targets = hidden_targets(teacher, data, features=states_read(teacher, args.features)) if budgets else None
        for width, method in itertools.product(widths, methods):
            for row in one_student(teacher, method, width, seed, data, targets, texts, budgets, args):
                rows.append(show(row))
                if args.out:
                    Path(args.out).write_text(json.dumps(rows, indent=2) + "\n")
    if args.sibling:
        rows.append(show(sibling(teacher, tokenizer, texts, args)))
    return rows


def build_config(settings: list[str]) -> BuildConfig:
    """Return the defaults with these KEY=VALUE changed."""
    pairs = (text.split("=", 1) for text in settings)
    return merge_flags(
        RunConfig(), {f"build.{key}": tomllib.loads(f"value = {value}")["value"] for key, value in pairs}
    ).build


def states_read(teacher: Teacher, features: str = "auto") -> tuple[str, ...]:
    """Return the names of the teacher's states that training reads."""
    layers = teacher.config.get_text_config().num_hidden_layers
    return teacher_features(AUTO_FEATURES.get(features, features), layers, layers)


def one_student(
    teacher: Teacher,
    method: str,
    width: int,
    seed: int,
    data: Blocks,
    targets: Any,
    texts: dict[str, Reference],
    budgets: list[int],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a student before training and after each budget; `seed` chooses every random number."""
    build, begun = data[: max(1, args.build_tokens // args.block)], time.monotonic()
    student = build_student(
        teacher, width_target(teacher, width), build, init=method, config=build_config(args.set), seed=seed
    )
    built, tokens = time.monotonic() - begun, build.tokens if method != "random" else 0
    row = {"method": method, "M": width, "seed": seed}
    yield row | {"trained": 0, "tokens": tokens} | judge(student, texts) | {"seconds": built}
    training = TrainConfig(features=args.features, epochs=args.epochs)
    for budget in budgets:
        copied, begun = copy.deepcopy(student), time.monotonic()
        train(copied, data, targets, budget, training, seed)
        seconds = built + time.monotonic() - begun
        yield row | {"trained": 1, "tokens": budget} | judge(copied, texts) | {"seconds": seconds}


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each method, width and budget: the mean over seeds and the standard deviation between them."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["M"], row["trained"], row["tokens"]), []).append(row)
    for (method, width, after, tokens), group in groups.items():
        names = [n for n in group[0] if n.endswith((" KL", " NLL")) or n == "seconds"]
        values = {n: [row[n] for row in group] for n in names}
        spread = {n: f" ±{statistics.stdev(v):.3f}" if len(v) > 1 and n != "seconds" else "" for n, v in values.items()}
        numbers = (f"{n} {statistics.fmean(v):.{0 if n == 'seconds' else 3}f}{spread[n]}" for n, v in values.items())
        yield f"{method:24s} M {width} {'trained' if after else 'built'} tokens {tokens} seeds {len(group)}  {'  '.join(numbers)}"


def judge_teacher(ref: Reference) -> float:
    """Return the teacher's own NLL."""
    return float(evaluate(ref, ref, bootstrap=10).nll)


def sibling(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase, texts: dict[str, Reference], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the row of a dense model of the student's shape, trained from random weights on text without a teacher."""
    torch.manual_seed(0)
    width, begun = int(args.widths.split(",")[0]), time.monotonic()
    model = AutoModelForCausalLM.from_config(width_target(teacher, width).config)
    data = load_blocks(args.data, tokenizer, args.block, "train", tokens=args.sibling)
    config = TrainConfig(tokens=data.tokens, alpha=1.0, lr=2e-3, eval_every=10**9, save_every=10**9)
    distill(model, data=data, config=config)
    row = {"method": "dense sibling", "M": width, "seed": 0, "trained": 1, "tokens": data.tokens}
    return row | judge(model, texts) | {"seconds": time.monotonic() - begun}


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print one row."""
    numbers = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) and k != "seconds" else f"{k} {v:.0f}" for k, v in row.items() if k != "method")  # fmt: skip
    print(f"{row['method']:24s} {numbers}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(ROOT / "examples" / "tiny-mixtral"))
    parser.add_argument(
        "--data", default=str(ROOT / "examples" / "text"), help="folder with train, valid and ood files"
    )
    parser.add_argument(
        "--methods", default="random,concat,layerwise", help=f"comma-separated, or all: {', '.join(ALL)}"
    )
    parser.add_argument("--widths", default="512")
    parser.add_argument("--seeds", default="0", help="each chooses its own text, such as 0,1,2")
    parser.add_argument("--budgets", default="", help="total teacher tokens to train with, such as 49152,491520")
    parser.add_argument("--build-tokens", type=int, default=49_152)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the build, such as local_steps=300",
    )
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the training text")
    parser.add_argument("--features", default="auto", help="feature losses of the training; '' = distributions alone")
    parser.add_argument(
        "--sibling", type=int, default=0, help="also train a dense model of this shape on so many tokens of text"
    )
    parser.add_argument("--out", default="", help="write the rows as JSON")
    for line in summary(run(parser.parse_args())):
        print(line)


if __name__ == "__main__":
    main()
