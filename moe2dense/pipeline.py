"""convert(): plan -> walk -> targets -> distill -> evaluate -> report -> export, read top to bottom."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2dense import reportstage, stages
from moe2dense.config import RunConfig
from moe2dense.planning import Plan, make_plan, print_plan
from moe2dense.regimes import progressive
from moe2dense.resolve import fetch, resolve_teacher
from moe2dense.run import open_run
from moe2dense.schedules import temperature_settings
from moe2dense.settings import configure
from moe2dense.units import names, parse_count


@dataclass(frozen=True)
class Result:
    """What a conversion left behind."""

    out: Path
    model: Path
    report: Path
    scores: dict[str, Any]  # row name -> numbers on the held-out text


def _count(text: str | int | None, name: str) -> int | None:
    return None if text is None else parse_count(text, name)


def plan(
    teacher: str,
    /,
    *,
    to: str = "",
    data: str | None = None,
    tokens: str | None = None,
    out: str | None = None,
    config: Path | None = None,
    memory: str | None = None,
    block: int | None = None,
    teacher_card: str | None = None,
    lora: int | None = None,
    json: bool = False,
) -> Plan:
    """Show what a conversion would build and cost, without reading weights.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id (owner/name), or a known name such as mixtral
    to: size of the student (7b, 350m), share of the teacher (25%), named target, or dense checkpoint
    data: text to distil on: folder with train/valid/test files, one file, or a hub id
    tokens: unique teacher positions, the walk's included (500k, 1b)
    out: folder of the run
    config: TOML file with settings; flags override it
    memory: budget for teacher weights and hidden states (2GB); default half of the free memory
    block: tokens per block; default min(2048, the teacher's max positions)
    teacher_card: TOML card of a family that is not shipped
    lora: rank of adapters to train instead of all weights
    json: print JSON instead of tables
    """
    from rich.console import Console

    flags = {"data.path": data, "train.tokens": _count(tokens, "--tokens"), "out": out, "teacher.memory": memory}
    flags |= {"data.block": block, "teacher.card": teacher_card, "train.lora": lora}
    result = make_plan(configure(teacher, to, config, flags))
    if json:
        Console().print_json(data=result.to_dict(), default=str)
    else:
        print_plan(result, Console())
    return result


def convert(
    teacher: str,
    /,
    *,
    to: str = "",
    data: str | None = None,
    valid: str | None = None,
    ood: str | None = None,
    tokens: str | int | None = None,
    init: str | None = None,
    out: str | Path | None = None,
    config: Path | None = None,
    memory: str | None = None,
    experts: str | None = None,
    block: int | None = None,
    teacher_card: str | None = None,
    loss: str | None = None,
    temperature: float | str | None = None,
    alpha: float | None = None,
    lr: float | None = None,
    epochs: float | None = None,
    lora: int | None = None,
    report_to: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    control: bool | None = None,
    stages: str | None = None,
    baseline: list[str] | None = None,
    allow_loss: str | None = None,
    judge: str | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Result | Plan:
    """Turn an MoE into a dense checkpoint, with a report of what survived.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id (owner/name), or a known name such as mixtral
    to: size of the student (7b, 350m), share of the teacher (25%), named target, or dense checkpoint to start from
    data: text to distil on: folder with train/valid/test files, one file, or a hub id
    valid: held-out text, where the data has none of its own
    ood: text of another kind, for the report
    tokens: unique teacher positions, the walk's included (500k, 1b); 0 stops after the walk
    init: how the student is built; see `moe2dense list methods`
    out: folder of the run; default ./TEACHER-TARGET
    config: TOML file with settings; flags override it
    memory: budget for teacher weights and hidden states (2GB); default half of the free memory
    experts: how experts are computed: auto, streamed, grouped_mm, megablocks
    block: tokens per block; default min(2048, the teacher's max positions)
    teacher_card: TOML card of a family that is not shipped
    loss: distillation loss; see `moe2dense list losses`
    temperature: softens both distributions; the loss is multiplied by its square. auto: chosen by short trainings
    alpha: weight of the hard-label loss; 1 - alpha weighs the distillation loss (some papers mean the opposite)
    lr: peak learning rate
    epochs: passes over the training text; replays cost no teacher tokens
    lora: rank of adapters to train instead of all weights
    report_to: none, tensorboard, trackio or wandb; metrics.jsonl is always written
    dtype: of the exported weights
    quantize: int8 or int4: quantise the exported student
    seed: of everything random
    device: auto, cpu or cuda
    control: also train a randomly initialised student, and with stages a direct one, to compare with
    stages: sizes from large to small (47%,40%): each student teaches the next; to is the last, or follows them
    baseline: a dense checkpoint with the teacher's tokenizer to compare with, such as its pretrained sibling; may be repeated
    allow_loss: domains of the held-out text that may be lost (code,drama); they are reported apart
    judge: folder of a third language model that scores what student and teacher write
    resume: continue the run in --out
    dry_run: print the plan and stop
    """
    flags = {"data.path": data, "data.valid": valid, "data.ood": ood, "train.tokens": _count(tokens, "--tokens")}
    flags |= {
        "walk.init": init,
        "out": None if out is None else str(out),
        "teacher.memory": memory,
        "teacher.experts": experts,
    }
    flags |= {"data.block": block, "teacher.card": teacher_card, "train.loss": loss}
    flags |= {f"train.{k}": v for k, v in temperature_settings(temperature).items()}
    flags |= {
        "train.alpha": alpha,
        "train.lr": lr,
        "train.epochs": epochs,
        "train.lora": lora,
        "train.report_to": report_to,
    }
    flags |= {
        "export.dtype": dtype,
        "export.quantize": quantize,
        "seed": seed,
        "teacher.device": device,
        "control": control,
        "stages": stages,
    }
    flags |= {"evaluate.baseline": baseline, "evaluate.allow_loss": names(allow_loss), "evaluate.judge": judge}
    settings = configure(teacher, to, config, flags)
    return run_conversion(settings, resume=resume, dry_run=dry_run)


def run_conversion(settings: RunConfig, *, resume: bool = False, dry_run: bool = False) -> Result | Plan:
    """convert() from resolved settings. Raises UserError for bad input; a stopped run continues with resume=True."""
    from rich.console import Console

    from moe2dense.progress import progress_for
    from moe2dense.regimes.texts import describe

    console = Console()
    stages.check_settings(settings)
    planned = make_plan(settings)
    print_plan(planned, console)
    if settings.stages:
        console.print(progressive.describe(settings))
    if said := describe(settings, planned):
        console.print(said, highlight=False)
    if dry_run:
        return planned
    resolved = resolve_teacher(settings.model, settings.teacher.card)
    with open_run(settings.out, settings, resume) as run, progress_for(console) as progress:
        from moe2dense.teacher.load import load_teacher

        source = fetch(resolved)
        about = settings.teacher
        teacher = load_teacher(
            source, memory=about.memory, experts=about.experts, device=about.device, card=resolved.card
        )
        text = stages.load_text(settings, planned, teacher.tokenizer())
        reportstage.check_report_settings(settings, text, teacher)
        short = stages.shortfall(text, planned)
        if short:
            console.print(f"[yellow]warning:[/] {short}")
        result = _stages(stages.Job(run, settings, planned, teacher, text, progress))
    reportstage.show_result(run.folder, console)
    return result


def _stages(job: stages.Job) -> Result:
    """Every stage in order. A finished one is read back from the run folder."""
    from moe2dense.regimes.texts import prepare_text

    whole, job = job, progressive.last_stage(job)
    student = stages.walk(job)
    rows = {"teacher": stages.score_teacher(job), "before": stages.score(job, student)}
    if job.plan.tokens:
        prepare_text(job, student)
        student = stages.train(job, student)
        rows["student"] = stages.score(job, student)
    else:
        rows["student"] = rows["before"]
    if job.settings.control:
        rows["control"] = stages.score(job, stages.control(job))
        if job.settings.stages:
            rows["direct"] = stages.score(job, progressive.direct(whole))
    rows |= reportstage.score_baselines(job)
    report = reportstage.write_report(job, student, rows)
    model = reportstage.export_model(job, student, report)
    return Result(job.run.folder, model, job.run.folder / "report.html", report["rows"])
