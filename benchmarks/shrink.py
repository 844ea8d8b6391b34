"""Students below what the FFN alone can give: channels, layers or heads go, against random weights of the same shape at equal tokens.

    python benchmarks/shrink.py                                     # 40% and 25% of the tiny teacher
    python benchmarks/shrink.py --sizes 25% --prune width,depth --data FOLDER --tokens 98304

For each size and kind of pruning: the built student before and after training, then the same shape with random FFNs around the attention copied
from the teacher, and with every weight random. All train on the same blocks; text is judged in one block from each passage.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from recovery import ROOT, judge, judge_teacher, one_block_per_passage, show, states_read, train
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe2dense.config.schema import BuildConfig
from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.errors import UserError
from moe2dense.evaluation.reference import reference
from moe2dense.student.build.api import build_student
from moe2dense.student.target.pruned import pruning_text
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher


def make_student(
    start: str, teacher: Teacher, target: Target, build: Blocks, config: BuildConfig
) -> Student | PreTrainedModel:
    """Return a student of the target's shape, or a bare model with every weight random."""
    if start != "every weight random":
        return build_student(
            teacher, target, build, init="layerwise" if start == "layerwise" else "random", config=config
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(target.config)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every row of the table; each is printed when it is known."""
    teacher = load_teacher(args.teacher)
    assert teacher.card is not None, "a teacher with experts"
    tokenizer = teacher.tokenizer()
    texts = {"valid": reference(teacher, one_block_per_passage(args.data, "valid", tokenizer, args.block, 96))}
    data = load_blocks(args.data, tokenizer, args.block, "train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    data = data[order[: args.tokens // args.block]]
    targets, build = (
        hidden_targets(teacher, data, features=states_read(teacher)),
        data[: args.build_tokens // args.block],
    )
    print(
        f"teacher NLL {judge_teacher(texts['valid']):.3f}; {data.tokens} tokens, the build's {build.tokens} included",
        flush=True,
    )
    rows = []
    for size in args.sizes.split(","):
        tried: list[dict[str, Any]] = []
        for prune in args.prune.split(","):
            try:
                target = resolve_target(size, teacher.config, teacher.card, prune)
            except UserError as error:
                print(f"{size} {prune}: {error}", flush=True)
                continue
            if target.geometry in tried:
                continue
            tried.append(target.geometry)
            pruning = pruning_text(target.teacher, target.geometry, "influence") or "all outside the FFNs"
            print(f"{size}, prune = {prune}: {pruning}, M = {target.width}, {target.parameters} parameters", flush=True)
            for start in ("layerwise", "random FFNs", "every weight random"):
                student = make_student(start, teacher, target, build, BuildConfig())
                row = {"method": f"{size} {prune} {start}", "tokens": build.tokens if start == "layerwise" else 0}
                rows.append(show(row | judge(student, texts)))
                train(student, data, targets, data.tokens, TrainConfig(epochs=args.epochs), 0)
                rows.append(show(row | {"tokens": data.tokens} | judge(student, texts)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(ROOT / "examples" / "tiny-mixtral"))
    parser.add_argument("--data", default=str(ROOT / "examples" / "text"), help="folder with train and valid files")
    parser.add_argument("--sizes", default="40%,25%")
    parser.add_argument("--prune", default="auto,width,depth,heads")
    parser.add_argument("--tokens", type=int, default=98_304, help="of teacher positions, the build's included")
    parser.add_argument("--build-tokens", type=int, default=49_152)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the text")
    parser.add_argument("--out", default="", help="write the rows as JSON")
    args = parser.parse_args()
    rows = run(args)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
