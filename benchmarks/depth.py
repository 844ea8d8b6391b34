"""What each start is worth in a deep teacher: quality, skills, errors layer by layer, seconds and memory.

    python benchmarks/depth.py TEACHER --data FOLDER                                # all starts at the active width, one seed
    python benchmarks/depth.py TEACHER --data FOLDER --widths active,half --seeds 0,1 --dense ORIGINAL
    python benchmarks/depth.py TEACHER --data FOLDER --starts concat,layerwise --train 163840,16384

examples/carve_moe.py makes a deep teacher of a dense model; `--dense` is that model, whose row says what a dense student could
reach. Each row runs in a process of its own, so that its peak memory is its own. Teacher tokens count every position that the
teacher was run on, the build's included. Text is judged in one block from each passage. An error of a layer is its squared
error over the squared change that the teacher's layer makes: 1 is no better than leaving the layer out. Seconds are those of
the build and of the training; the teacher's answers that training follows take the same time for every row and are left out.

What was measured with it: docs/results.md.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from recovery import build_config, one_block_per_passage, states_read, train, width_target
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.frequency import count_tokens
from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.memory import HiddenTargets, hidden_targets
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import AnyModel, Reference, reference
from moe2dense.evaluation.skill_probes import Probe, fact_probes, text_probes, tokenised
from moe2dense.evaluation.skills import measure_skills
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

STARTS = ("random", "average", "concat", "select+refit", "obs+refit", "obs+refit+local", "layerwise")


def widths_of(teacher: Teacher, text: str) -> list[int]:
    """Return the student widths that `active,half,512` means."""
    assert teacher.card is not None
    active = teacher_geometry(teacher.config, teacher.card).active_width
    named = {"active": active, "half": active // 2}
    return [named[name] if name in named else int(name) for name in text.split(",")]


def build_text(teacher: Teacher, args: argparse.Namespace, seed: int) -> Blocks:
    """Return the training text of a seed: its first blocks are the build's."""
    text = load_blocks(args.data, teacher.tokenizer(), args.block, "train")
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))]


def skill_tasks(teacher: Teacher, text: Blocks, count: int) -> list[Probe]:
    """Return the tasks that teacher and students solve: texts of fixed rules, and facts of the training text."""
    tokenizer = teacher.tokenizer()
    facts = fact_probes(text, count_tokens(text), tokenizer, count)
    return [*tokenised(text_probes(count), tokenizer), *facts]


def references(teacher: Teacher, args: argparse.Namespace) -> dict[str, Reference]:
    """Return the teacher's answers on held-out text and on text of another kind."""
    tokenizer = teacher.tokenizer()
    blocks = {s: one_block_per_passage(args.data, s, tokenizer, args.block, args.judged) for s in ("valid", "ood")}
    return {split: reference(teacher, rows) for split, rows in blocks.items()}


def scores(teacher: Teacher, model: AnyModel, args: argparse.Namespace, text: Blocks) -> dict[str, float]:
    """Return KL and NLL in nats per token on both texts, and the mean retention of the skills that the teacher has."""
    numbers: dict[str, float] = {}
    for split, answers in references(teacher, args).items():
        own = answers if isinstance(model, Teacher) else model
        result = evaluate(own, answers, bootstrap=0)
        numbers |= {f"{split} KL": float(result.kl), f"{split} NLL": float(result.nll)}
    measured = measure_skills([("teacher", teacher), ("student", model)], skill_tasks(teacher, text, args.skills))
    skills = [row["retention"]["student"] for row in measured["skills"]] if measured else []
    retained = [share for share in skills if share is not None]
    return numbers | {"skills": statistics.fmean(retained) if retained else float("nan")}


def stored_answers(teacher: Teacher, data: Blocks, args: argparse.Namespace, seed: int) -> HiddenTargets:
    """Return the teacher's answers on a text, which all rows of a seed share; with `--work` they are computed once."""
    path = Path(args.work) / f"answers-{seed}-{data.tokens}.pt" if args.work else None
    if path is None or not path.is_file():
        answers = hidden_targets(teacher, data, dtype=torch.bfloat16, features=states_read(teacher))
        if path is None:
            return answers
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((answers.hidden, answers.features, answers.layers), path)
    hidden, features, layers = torch.load(path, mmap=True)
    return HiddenTargets(hidden, teacher.head, features, layers)


def layer_errors(history: list[dict[str, Any]]) -> list[float]:
    """Return the error of every layer of a build, first to last."""
    return [round(record["error"], 4) for record in history if "layer" in record and "error" in record]


def peak_gigabytes() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one_start(args: argparse.Namespace, start: str, width: int, seed: int, budget: int) -> list[dict[str, Any]]:
    """Build one student, train it on `budget` teacher tokens (0: not at all), and return its rows: built, and trained."""
    torch.set_num_threads(args.threads)
    teacher = load_teacher(args.teacher)
    text, begun = build_text(teacher, args, seed), time.monotonic()
    build = text[: max(1, args.build_tokens // args.block)]
    student = build_student(
        teacher, width_target(teacher, width), build, init=start, config=build_config(args.set), seed=seed
    )
    seconds = time.monotonic() - begun
    known = {"start": start, "width": width, "seed": seed}
    built = known | {"trained": 0, "tokens": 0 if start == "random" else build.tokens, "seconds": seconds}
    built |= {"GB": peak_gigabytes()} | scores(teacher, student, args, text) | fits_of(student)
    if not budget:
        return [built]
    data = text[: budget // args.block]
    targets, begun = stored_answers(teacher, data, args, seed), time.monotonic()
    train(student, data, targets, budget, TrainConfig(epochs=args.epochs), seed)
    trained = known | {"trained": budget, "tokens": max(built["tokens"], budget)}
    trained |= {"seconds": seconds + time.monotonic() - begun, "GB": peak_gigabytes()}
    return [built, trained | scores(teacher, student, args, text)]


def fits_of(student: Student) -> dict[str, Any]:
    """Return the layers' errors, how many fits a build had and how many of them learnt nothing."""
    fits = [record for record in student.history if "heal_best_step" in record or "local_best_step" in record]
    unmoved = sum(0 in (record.get("heal_best_step"), record.get("local_best_step")) for record in fits)
    return {"errors": layer_errors(student.history), "fits": len(fits), "fits that kept step 0": unmoved}


def whole_model_row(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Return one row, that of the teacher itself, or of the dense model that it was carved from."""
    torch.set_num_threads(args.threads)
    teacher = load_teacher(args.teacher)
    model: AnyModel = teacher if name == "teacher" else dense_original(Path(args.dense))
    row = {"start": name, "width": 0, "seed": 0, "trained": 0, "tokens": 0}
    return [row | scores(teacher, model, args, build_text(teacher, args, 0)) | {"seconds": 0.0, "GB": peak_gigabytes()}]


def dense_original(path: Path) -> PreTrainedModel:
    """Load a dense model from a folder or from a GGUF file."""
    gguf = path.suffix == ".gguf"
    options = {"gguf_file": path.name} if gguf else {}
    return AutoModelForCausalLM.from_pretrained(path.parent if gguf else path, dtype=torch.float32, **options)


def in_own_process(function: Any, *arguments: Any) -> list[dict[str, Any]]:
    """Call a function in a new process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def show(row: dict[str, Any]) -> None:
    """Print a row, and its layers' errors below it."""
    numbers = "  ".join(f"{k} {row[k]:.3f}" for k in ("valid KL", "valid NLL", "ood KL", "ood NLL", "skills"))
    place = f"width {row['width']:4d} seed {row['seed']} trained {row['trained']:6d} tokens {row['tokens']:6d}"
    print(f"{row['start']:16s} {place}  {numbers}  s {row['seconds']:.0f}  GB {row['GB']:.2f}", flush=True)
    if row.get("errors"):
        unmoved = f"  {row['fits that kept step 0']} of {row['fits']} fits kept step 0" if row["fits"] else ""
        errors = " ".join(f"{e:.3g}" for e in row["errors"])
        print(
            f"    errors by layer: median {statistics.median(row['errors']):.3f}, last {row['errors'][-1]:.3f}{unmoved}: {errors}"
        )


def run(args: argparse.Namespace) -> None:
    """Measure every row that `--out` does not hold yet; each is printed and written when it is known."""
    out = Path(args.out) if args.out else None
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out and out.is_file() else []
    known = {(r["start"], r["width"], r["seed"], r["trained"]) for r in rows}
    widths = widths_of(load_teacher(args.teacher), args.widths)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    budgets = [int(tokens) for tokens in args.train.split(",") if tokens] or [0]
    starts = [name for name in args.starts.split(",") if name]

    def add(key: tuple[str, int, int, int], function: Any, *arguments: Any) -> None:
        if key in known:
            return
        for row in in_own_process(function, args, *arguments):
            if (row["start"], row["width"], row["seed"], row["trained"]) not in known:
                rows.append(row)
                show(row)
        if out:
            out.write_text(json.dumps(rows, indent=1) + "\n")

    for name in ("teacher", "dense") if args.dense else ("teacher",):
        add((name, 0, 0, 0), whole_model_row, name)
    for seed in seeds:
        for width in widths:
            for number, start in enumerate(starts):
                budget = budgets[number] if len(budgets) > 1 else budgets[0]
                add((start, width, seed, budget), one_start, start, width, seed, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder of the MoE checkpoint")
    parser.add_argument("--data", required=True, help="folder with train, valid and ood files")
    parser.add_argument("--dense", default="", help="the dense model that the teacher was carved from: folder or GGUF")
    parser.add_argument("--starts", default=",".join(STARTS), help="what follows --init, comma-separated")
    parser.add_argument("--widths", default="active", help="FFN widths: active, half, or numbers")
    parser.add_argument("--seeds", default="0", help="each chooses its own text, such as 0,1")
    parser.add_argument("--build-tokens", type=int, default=16_384)
    parser.add_argument("--train", default="", help="teacher tokens to train on in all: one number, or one a start")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the training text")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the build")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--judged", type=int, default=24, help="blocks that are judged, of each text")
    parser.add_argument("--skills", type=int, default=20, help="tasks of each skill")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", default="", help="keep the teacher's answers in this folder, for all rows")
    parser.add_argument("--out", default="", help="write the rows as JSON; rows that it holds are not measured again")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
