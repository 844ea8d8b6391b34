"""convert(): plan -> build -> targets -> distill -> evaluate -> report -> export, read top to bottom."""

from moe2dense.config.schema import RunConfig
from moe2dense.conversion import progressive, report_stage, stages
from moe2dense.conversion.checks import check_report_settings, check_settings
from moe2dense.conversion.job import Job, load_text, shortfall
from moe2dense.conversion.plan import make_plan
from moe2dense.conversion.results import Plan, Result
from moe2dense.conversion.run import open_run
from moe2dense.conversion.show_plan import print_plan
from moe2dense.families.resolve import fetch, resolve_teacher


def run_conversion(settings: RunConfig, *, resume: bool = False, dry_run: bool = False) -> Result | Plan:
    """convert() from resolved settings. Raises UserError for bad input; a stopped run continues with resume=True."""
    from rich.console import Console

    from moe2dense.common.progress import progress_for
    from moe2dense.conversion.show_plan import describe

    console = Console()
    check_settings(settings)
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
        text = load_text(settings, planned, teacher.tokenizer())
        check_report_settings(settings, text, teacher)
        short = shortfall(text, planned)
        if short:
            console.print(f"[yellow]warning:[/] {short}")
        result = _stages(Job(run, settings, planned, teacher, text, progress))
    report_stage.show_result(run.folder, console)
    return result


def _stages(job: Job) -> Result:
    """Every stage in order. A finished one is read back from the run folder."""
    from moe2dense.conversion.training_text import prepare_text

    whole, job = job, progressive.last_stage(job)
    student = stages.build(job)
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
    rows |= report_stage.score_baselines(job)
    report = report_stage.write_report(job, student, rows)
    model = report_stage.export_model(job, student, report)
    return Result(job.run.folder, model, job.run.folder / "report.html", report["rows"])
