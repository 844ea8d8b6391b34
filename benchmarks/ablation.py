"""Do the report's numbers about an expert predict what its surviving neurons are worth?

Builds a student of the example teacher from neurons of many experts, measures every expert, then silences the neurons that
came from each expert in turn and measures how much KL to the teacher rises. Prints Spearman rank correlations over all
(layer, expert) pairs.

    python benchmarks/ablation.py [--teacher examples/tiny-mixtral] [--data examples/text] [--to 3.2m] [--init obs+refit] [--blocks 24]
"""

import argparse
from pathlib import Path

import torch
from scipy.stats import spearmanr

from moe2dense.data.load import load_blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.evaluation.transfer.measure import measure_transfer
from moe2dense.student.build.api import build_student
from moe2dense.student.store import load_student
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher

ROOT = Path(__file__).parents[1]
METRICS = ("coverage", "kept_energy", "energy_share", "load", "error_after", "kl_after")


@torch.no_grad()
def ablation_costs(student: Student, text: Reference, base: float) -> dict[tuple[int, int], float]:
    """Return by (layer, expert) the rise of KL when the student's neurons of that expert are silenced; 0 without neurons."""
    costs = {}
    for layer, (module, provenance) in enumerate(
        zip(student.model.get_decoder().layers, student.provenance, strict=True)
    ):
        down = module.get_submodule(student.card.ffn).get_submodule(student.card.down).weight
        for e in range(len(provenance.energy_total)):
            own = provenance.source_expert.to(down.device) == e
            before = down[:, own].clone()
            down[:, own] = 0
            costs[layer, e] = evaluate(student, text, bootstrap=0).kl - base if own.any() else 0.0
            down[:, own] = before
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(ROOT / "examples" / "tiny-mixtral"))
    parser.add_argument("--data", default=str(ROOT / "examples" / "text"))
    parser.add_argument("--to", default="3.2m")
    parser.add_argument("--init", default="obs+refit")
    parser.add_argument("--student", help="a folder written by a run's build, instead of building one")
    parser.add_argument("--blocks", type=int, default=24)
    args = parser.parse_args()
    teacher = load_teacher(args.teacher)
    tokenizer = teacher.tokenizer()
    if args.student:
        student = load_student(args.student)
    else:
        train = load_blocks(args.data, tokenizer, 256, "train", tokens=50_000)
        student = build_student(teacher, to=args.to, data=train, init=args.init)
    held_out = load_blocks(args.data, tokenizer, 256, "valid", tokens=96 * 256)
    ref = reference(teacher, held_out[: args.blocks])
    base = evaluate(student, ref, bootstrap=0).kl
    costs = ablation_costs(student, ref, base)
    scores = evaluate(student, teacher, held_out, bootstrap=0)
    transfer = measure_transfer(teacher, held_out, student, scores=scores, replaceability=False)
    pairs = [
        (r, e) for r in transfer.layers for e in range(len(r["measured"])) if r["metrics"]["coverage"][e] is not None
    ]
    cost = [costs[r["index"], e] for r, e in pairs]
    print(
        f"{student.method}: KL {base:.3f} on {args.blocks} blocks; silencing one expert's neurons adds {min(cost):.4f} to {max(cost):.4f}"
    )
    print(f"Spearman over {len(pairs)} experts, with the rise of KL:")
    for name in METRICS:
        print(f"  {name:14s} {spearmanr([r['metrics'][name][e] for r, e in pairs], cost).statistic:+.2f}")
    worth = [r["metrics"]["coverage"][e] * r["metrics"]["energy_share"][e] for r, e in pairs]
    print(f"  {'coverage x energy share':14s} {spearmanr(worth, cost).statistic:+.2f}")


if __name__ == "__main__":
    main()
