"""Every recipe of examples/recipes at equal teacher tokens: KL, NLL, KL on other text and seconds, best first.

    python benchmarks/recipes.py --data FOLDER                          # all recipes, default 98,304 teacher tokens each
    python benchmarks/recipes.py --data FOLDER --only default,hinton    # in parts: results are added to --results
    python benchmarks/recipes.py --show                                 # the table of what was measured so far
    python benchmarks/recipes.py --data FOLDER --only default --set teacher.quantize=int4 --seeds 3
    python benchmarks/recipes.py --data FOLDER --teachers int8,int4,nf4  # how far rounding the experts moves the targets themselves

Teacher tokens are positions the teacher was run on, the build's included; text that the teacher writes comes on top and is shown as `written`.
Recipes that start from the same build share it: it is built once and its seconds count for each. Text is judged on --blocks blocks.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import xxhash

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.conversion import scoring, stages
from moe2dense.conversion.checks import check_settings
from moe2dense.conversion.configure import configure
from moe2dense.conversion.job import Job, load_text
from moe2dense.conversion.planning import make_plan
from moe2dense.conversion.progressive import last_stage
from moe2dense.conversion.run import open_run
from moe2dense.conversion.training_text import with_training_text
from moe2dense.data.load import load_blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import Reference, reference
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "examples" / "recipes"


def settings_of(recipe: Path, args: argparse.Namespace, seed: int, out: Path) -> RunConfig:
    """Return the recipe at this benchmark's tokens, text and seed."""
    flags: dict[str, Any] = {"data.path": args.data, "data.valid": args.data, "data.ood": args.data, "out": str(out)}
    flags |= {"seed": seed, "data.eval_blocks": args.blocks, "teacher.memory": "1GB"}
    settings = configure(args.teacher, args.to, recipe, flags)
    if settings.train.tokens:
        settings = merge_flags(settings, {"train.tokens": args.tokens})
    for pair in args.set:
        key, _, value = pair.partition("=")
        settings = merge_flags(settings, {key: json.loads(value) if value and value[0] in '0123456789"[' else value})
    return merge_flags(settings, {"train.eval_every": 10**9, "train.save_every": 10**9})


def build_key(settings: RunConfig, args: argparse.Namespace) -> str:
    """Return a hash that tells builds apart."""
    identity = [
        dataclasses.asdict(settings.build),
        settings.seed,
        settings.teacher.quantize,
        args.data,
        args.teacher,
        args.to,
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())


def measure(
    recipe: Path, args: argparse.Namespace, seed: int, teacher: Teacher, references: dict[str, Reference]
) -> dict[str, Any]:
    """Run one recipe with one seed; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(recipe, args, seed, Path(folder) / "run")
        check_settings(settings)
        plan = make_plan(settings)
        text = load_text(settings, plan, teacher.tokenizer())
        with open_run(settings.out, settings) as run:
            job = Job(run, settings, plan, teacher, text, lambda *_, **__: None, references)
            cached = Path(args.cache) / build_key(settings, args)
            if not settings.stages and (cached / "entry.json").is_file():
                shutil.copytree(cached / "build", run.folder / "build")
                run.finish("build", **json.loads((cached / "entry.json").read_text()))
            start_time = time.monotonic()
            job = last_stage(job)
            student = stages.build(job)
            entry = job.run.finished("build") or {}
            if not settings.stages and not (cached / "entry.json").is_file():
                shutil.copytree(run.folder / "build", cached / "build", dirs_exist_ok=True)
                (cached / "entry.json").write_text(json.dumps({k: v for k, v in entry.items() if k != "finished"}))
                start_time += entry["seconds"]
            if plan.tokens:
                student = stages.train(with_training_text(job, student), student)
            seconds = time.monotonic() - start_time + (0 if settings.stages else entry["seconds"])
            scores = scoring.score(job, student)
            written = (run.finished("write") or {}).get("tokens", 0)
    return {
        "recipe": recipe.stem, "set": args.set, "seed": seed, "tokens": plan.tokens or plan.build_tokens, "written": written,
        "kl": float(scores["valid"].kl), "nll": float(scores["valid"].nll), "ood_kl": float(scores["ood"].kl),
        "teacher_nll": float(scores["valid"].teacher_nll), "seconds": round(seconds, 1), "train_seconds": round(seconds - entry["seconds"], 1),
    }  # fmt: skip


def rounded_teachers(args: argparse.Namespace) -> None:
    """Print the KL from the full teacher to the same teacher with rounded experts, on held-out text of both kinds."""
    full = load_teacher(args.teacher, memory="1GB")
    texts = {
        split: load_blocks(args.data, full.tokenizer(), 256, split, tokens=args.blocks * 256)
        for split in ("valid", "ood")
    }
    truths = {name: reference(full, blocks) for name, blocks in texts.items()}
    print("| experts | KL to the full teacher | NLL | ood KL |\n|---|---|---|---|")
    for bits in ["", *args.teachers.split(",")]:
        teacher = load_teacher(args.teacher, memory="1GB", quantize=bits)
        scores = {name: evaluate(reference(teacher, blocks), truths[name]) for name, blocks in texts.items()}
        numbers = [scores["valid"].kl, scores["valid"].nll, scores["ood"].kl]
        print(f"| {bits or 'as stored'} | " + " | ".join(f"{float(n):.4f}" for n in numbers) + " |", flush=True)


def show(rows: list[dict[str, Any]]) -> str:
    """Return the table, best first; several seeds as mean and range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    common = set.intersection(*(set(row["set"]) for row in rows)) if rows else set()  # said once, in the command
    for row in rows:
        groups.setdefault((row["recipe"], *(pair for pair in row["set"] if pair not in common)), []).append(row)

    def cell(group: list[dict[str, Any]], key: str) -> str:
        values = [r[key] for r in group]
        spread = f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    lines = ["| recipe | KL | NLL | ood KL | tokens | written | seconds |", "|---|---|---|---|---|---|---|"]
    ranked = sorted(groups.items(), key=lambda kv: statistics.mean(r["kl"] for r in kv[1]))
    for name, group in ranked:
        cells = [" ".join(name), *(cell(group, k) for k in ("kl", "nll", "ood_kl")), str(group[0]["tokens"])]
        cells += [str(group[0]["written"]), f"{statistics.mean(r['seconds'] for r in group):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(ROOT / "examples" / "tiny-mixtral"))
    parser.add_argument("--to", default="3.2m")
    parser.add_argument(
        "--data", default=str(ROOT / "examples" / "text"), help="folder with train, valid and ood files"
    )
    parser.add_argument("--only", default="", help="recipes by name, comma-separated")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=96)
    parser.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE over the recipe, such as teacher.quantize=int4"
    )
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "moe2dense-builds"), help="built students")
    parser.add_argument("--results", default="recipes.json")
    parser.add_argument("--show", action="store_true", help="print the table of --results and stop")
    parser.add_argument("--teachers", default="", help="measure rounded teachers (int8,int4,nf4) instead of recipes")
    args = parser.parse_args()
    if args.teachers:
        return rounded_teachers(args)
    results = Path(args.results)
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else []
    if not args.show:
        names = args.only.split(",") if args.only else [p.stem for p in sorted(RECIPES.glob("*.toml"))]
        teacher, references = load_teacher(args.teacher, memory="1GB"), {}
        done = {(r["recipe"], *r["set"], r["seed"]) for r in rows}
        for name in names:
            for seed in range(args.seeds):
                if (name, *args.set, seed) in done:
                    continue
                row = measure(RECIPES / f"{name}.toml", args, seed, teacher, references)
                rows.append(row)
                results.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(row), flush=True)
    print(show(rows))
    return None


if __name__ == "__main__":
    main()
