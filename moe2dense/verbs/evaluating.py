"""`moe2dense eval`: a dense checkpoint against its teacher on held-out text, on tasks, and in what both write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moe2dense.data import Blocks


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

    from moe2dense.baseline import check_baselines
    from moe2dense.harness import check_harness, read_tasks
    from moe2dense.reportstage import check_allowed
    from moe2dense.units import names, parse_count
    from moe2dense.verbs.common import open_teacher, read_text

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
    from moe2dense.judge import Judge, check_judge

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
    from moe2dense.baseline import open_baseline
    from moe2dense.config import EvaluateConfig
    from moe2dense.evaluation import evaluate, reference
    from moe2dense.harness import run_tasks
    from moe2dense.reporting.assemble import split_rows
    from moe2dense.sidebyside import side_by_side

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

    from moe2dense.reporting.sheet import write_sheet
    from moe2dense.run import atomic_write

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


def score_table(rows: dict[str, Any], title: str) -> Any:
    """Scores (as dicts) by row name as a rich table: value and 95% interval."""
    table = _table(title, "KL", "NLL", "same choice", "rare KL")
    for name, scores in rows.items():
        table.add_row(_short(name), *(_cell(scores[k]) for k in ("kl", "nll", "agreement", "rare_kl")))
    return table


def task_table(tasks: dict[str, Any], models: list[str]) -> Any:
    """Results of the harness as a rich table: a line for each task and metric, a column for each model, 95% intervals."""
    table = _table("tasks of lm-evaluation-harness", *map(_short, models))
    for task, metrics in tasks.items():
        for metric, values in metrics.items():
            table.add_row(_short(f"{task} {metric}", 30), *(_task_cell(values.get(m)) for m in models))
    return table


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=12)
    return table


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _task_cell(found: dict[str, float | None] | None) -> str:
    if not found or found["value"] is None:
        return "–"
    error = found["stderr"]
    return f"{found['value']:.3f}" + ("" if error is None else f" ±{1.96 * error:.3f}")


def _cell(found: dict[str, Any]) -> str:
    """Value and half the width of its 95% interval."""
    value = found["value"]
    if found["low"] is None or found["high"] is None:
        return f"{value:.3f}"
    half = (found["high"] - found["low"]) / 2
    return f"{value:.1f} ±{half:.1f}" if value >= 10 else f"{value:.3f} ±{half:.3f}"
