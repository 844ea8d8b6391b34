"""What the plain `convert` command gives: KL of its exported student to the teacher, by a judge of its own.

    python benchmarks/default_quality.py --data FOLDER                               # examples/tiny-mixtral to 3.2m
    python benchmarks/default_quality.py --data FOLDER --teacher FINE_GRAINED --to 25%
    python benchmarks/default_quality.py --data FOLDER --tokens 98k --config FILE.toml --seeds 0,1
    python benchmarks/default_quality.py --data FOLDER --judge OUT                   # judge the student of a run again

The command is `moe2dense convert TEACHER --to SIZE --data FOLDER --tokens 490k --no-control`: the control is another student and
changes nothing in this one; settings of `--config` take the place of defaults. The judge is plain transformers: both models read
one block of 256 tokens from each of 96 evenly spaced passages, of held-out text and of text of another kind, and their whole distributions are compared in float64.

What was measured with it: docs/results.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.conversion.api import convert
from moe2dense.data.records import passages

ROOT = Path(__file__).parent.parent


def judged_blocks(folder: str, split: str, tokenizer: PreTrainedTokenizerBase, block: int, count: int) -> torch.Tensor:
    """Return [count, block]: the first tokens of evenly spaced passages among those that are long enough."""
    texts = (record["text"] for record in passages(folder, split, 0))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    long = [row[:block] for row in rows if len(row) >= block]
    count = min(count, len(long))
    return torch.tensor([long[i * len(long) // count] for i in range(count)])


@torch.no_grad()
def mean_kl(teacher: PreTrainedModel, student: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Return the mean KL(teacher || student) in nats per token that follows another in its block."""
    total = 0.0
    for row in blocks.split(4):
        goal, own = (model(row).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
        total += float((goal.exp() * (goal - own)).sum())
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def judge(teacher: str, model: Path, data: str, block: int, count: int) -> dict[str, float]:
    """Return the KL of an exported student on both texts."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (teacher, model)]
    splits = {split: judged_blocks(data, split, tokenizer, block, count) for split in ("valid", "ood")}
    return {split: mean_kl(*models, blocks) for split, blocks in splits.items()}


def built_kl(out: Path) -> float:
    """Return the KL of the student before training, as the run's own report has it."""
    return float(json.loads((out / "report.json").read_text())["rows"]["before"]["kl"]["value"])


def run(args: argparse.Namespace, seed: int) -> None:
    """Convert with the defaults and what `--config` changes, judge the student and print one line."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(args.judge or (f"{args.out}-{seed}" if args.out else Path(temporary) / "run"))
        if not args.judge:
            convert(
                args.teacher,
                to=args.to,
                data=args.data,
                tokens=args.tokens,
                out=out,
                config=Path(args.config) if args.config else None,
                seed=seed,
                control=False,
            )
        seconds = time.monotonic() - begun
        numbers = judge(args.teacher, out / "model", args.data, args.block, args.passages)
        before = built_kl(out)
    text = "  ".join(f"{split} KL {kl:.4f}" for split, kl in numbers.items())
    text += f"  (before training {before:.4f} by the report)"
    if args.judge:
        print(f"{args.judge}: {text}")
        return
    name = f"{Path(args.teacher).name} to {args.to}, {args.tokens} tokens, {args.config or 'defaults'}, seed {seed}"
    print(f"{name}: {text}  {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(ROOT / "examples" / "tiny-mixtral"))
    parser.add_argument("--to", default="3.2m")
    parser.add_argument("--data", required=True, help="folder with train, valid and ood files")
    parser.add_argument("--tokens", default="490k")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--passages", type=int, default=96)
    parser.add_argument("--config", default="", help="a TOML file of settings that differ from the defaults")
    parser.add_argument("--seeds", default="0", help="one conversion for each, such as 0,1")
    parser.add_argument("--out", default="", help="keep the runs in OUT-SEED")
    parser.add_argument(
        "--judge", default="", metavar="OUT", help="judge the student of this run instead of converting"
    )
    args = parser.parse_args()
    for seed in [0] if args.judge else args.seeds.split(","):
        run(args, int(seed))


if __name__ == "__main__":
    main()
