"""`moe2dense eval`: a dense checkpoint against its teacher on held-out text, on tasks, and in what both write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe2dense.cli.tables import score_table, task_table

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks


def evaluate_checkpoint(
    student: str,
    /,
    *,
    teacher: str,
    data: str,
    split: Literal["valid", "test", "ood", "train", "all"] = "valid",
    tokens: str = "25k",
    block: int = 0,
    baseline: list[str] | None = None,
    allow_loss: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    samples: int = 0,
    judge: str = "",
    out: Path | None = None,
    seed: int = 0,
    memory: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
    json: bool = False,
) -> None:
    """Compare a student with its teacher: KL, NLL, agreement, rare tokens, domains, with 95% intervals.

    Parameters
    ----------
    student: folder of a dense checkpoint or of a run
    teacher: folder of a checkpoint, hub id, or known name
    data: held-out text: folder, file, or hub id
    split: which of the folder's files; `all` takes a file as it stands
    tokens: how much of it
    block: tokens per block; default min(2048, the teacher's max positions)
    baseline: a dense checkpoint with the teacher's tokenizer, for a row of its own; may be repeated
    allow_loss: domains of the text that may be lost (code,drama); they are reported apart
    tasks: tasks of lm-evaluation-harness for teacher, student and baselines: names or task files (arc_easy,my/task.yaml)
    limit: documents of each task
    samples: held-out prompts that student and teacher continue, side by side
    judge: folder of a third language model that scores what student and teacher write
    out: folder for eval.json and the blind rating sheet of the samples
    seed: of the bootstrap, the order of the text and the samples
    memory: budget for teacher weights and hidden states
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    json: print JSON instead of tables
    """
    from rich.console import Console

    from moe2dense.cli.common import open_teacher, read_text
    from moe2dense.common.units import names, parse_count
    from moe2dense.conversion.checks import check_allowed
    from moe2dense.evaluation.baselines import check_baselines
    from moe2dense.evaluation.lm_eval_tasks import check_harness, read_tasks

    wanted, allowed = names(tasks) or [], names(allow_loss) or []
    if wanted:
        check_harness()
        read_tasks(wanted)
    model = open_teacher(teacher, memory=memory, device=device, card=teacher_card)
    check_baselines([student], model.tokenizer(), "STUDENT")
    check_baselines(baseline or [], model.tokenizer())
    judging = _judge(judge, model, student, memory, device) if judge else None
    blocks = read_text(data, model, block, split, parse_count(tokens, "--tokens"), seed)
    check_allowed(allowed, blocks.domains)
    found = _measure(
        model,
        blocks,
        [student, *(baseline or [])],
        allowed,
        wanted,
        limit,
        samples or (4 if judge else 0),
        judging,
        seed,
    )
    if out is not None:
        _write(found, out, seed)
    if json:
        Console().print_json(data=found)
    else:
        _print(found, student, f"{blocks.tokens} tokens of {data} ({split})", Console())


def _judge(judge: str, teacher: Any, student: str, memory: str, device: str) -> Any:
    from moe2dense.evaluation.judge import Judge, check_judge

    check_judge(judge, teacher.path, student)
    return Judge(judge, memory, device)


def _measure(
    teacher: Any,
    blocks: "Blocks",
    students: list[str],
    allowed: list[str],
    tasks: list[str],
    limit: int | None,
    samples: int,
    judge: Any,
    seed: int,
) -> dict[str, Any]:
    """{"rows", "apart", "tasks", "samples"} as plain values; the last three None where they were not asked for."""
    from moe2dense.config.schema import EvaluateConfig
    from moe2dense.evaluation.api import evaluate
    from moe2dense.evaluation.baselines import open_baseline
    from moe2dense.evaluation.lm_eval_tasks import run_tasks
    from moe2dense.evaluation.reference import reference
    from moe2dense.evaluation.samples import side_by_side
    from moe2dense.reporting.assemble import split_rows

    truth, tokenizer = reference(teacher, blocks), teacher.tokenizer()
    rows = {"teacher": evaluate(truth, truth, seed=seed)}
    scored = run_tasks({"teacher": teacher}, tokenizer, tasks, limit=limit, seed=seed) if tasks else None
    written = None
    for name in students:
        model = open_baseline(name)
        rows[name] = evaluate(model, truth, seed=seed)
        if scored is not None:
            for task, metrics in run_tasks({name: model}, tokenizer, tasks, limit=limit, seed=seed).items():
                for metric, values in metrics.items():
                    scored[task][metric] |= values
        if samples and name == students[0]:
            options = EvaluateConfig(samples=samples)
            written = side_by_side(model, teacher, blocks, options, tokenizer=tokenizer, seed=seed, judge=judge)
    return {
        "rows": {name: scores.to_dict() for name, scores in rows.items()},
        "apart": {"domains": allowed, **(split_rows(rows, allowed) or {})} if allowed else None,
        "tasks": scored,
        "samples": written,
    }


def _write(found: dict[str, Any], out: Path, seed: int) -> None:
    import json

    from moe2dense.common.files import atomic_write
    from moe2dense.reporting.rating_sheet import write_sheet

    atomic_write(out / "eval.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if found["samples"]:
        write_sheet(found["samples"], out, seed)


def _print(found: dict[str, Any], student: str, title: str, console: Any) -> None:
    from moe2dense.reporting.terminal import written_table

    console.print(score_table(found["rows"], title))
    domains = found["rows"][student]["by_domain"]
    if sorted(domains) != [""]:
        shown = "  ".join(f"{d} {domains[d]['kl']['value']:.3f}" for d in sorted(domains))
        console.print(f"KL by domain: {shown}")
    if apart := found["apart"]:
        lost = ", ".join(apart["domains"])
        console.print(score_table(apart["kept"], f"without {lost}"))
        console.print(score_table(apart["lost"], f"{lost} alone: may be lost"))
    if found["tasks"]:
        console.print(task_table(found["tasks"], list(found["rows"])))
    if samples := found["samples"]:
        console.print(written_table(samples))
        for row in samples["rows"]:
            console.print(f"\n{row['prompt']}", style="dim", highlight=False, markup=False)
            for who in ("student", "teacher"):
                if row.get(who) is not None:
                    console.print(f"{who}: {row[who]}", highlight=False, markup=False)
        console.print(samples["how"], highlight=False)
