"""A whole conversion, read top to bottom: plan -> build -> targets -> distill -> evaluate -> report -> export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moe2dense.common.processes import from_first, join_processes
from moe2dense.common.progress import progress_for
from moe2dense.config.schema import RunConfig
from moe2dense.conversion import progressive, report_stage, scoring, stages
from moe2dense.conversion.checks import check_places, check_report_settings, check_settings, check_text
from moe2dense.conversion.choice import BUILT, Choice, choose
from moe2dense.conversion.configure import resumed_settings
from moe2dense.conversion.extra_text import extra_text, with_falling_features
from moe2dense.conversion.for_stack import for_stack
from moe2dense.conversion.job import Job, Text, load_text, shortfall
from moe2dense.conversion.mirroring import fetch_run, mirrored
from moe2dense.conversion.planning import make_plan
from moe2dense.conversion.results import Plan, Result
from moe2dense.conversion.run import Run, open_run
from moe2dense.conversion.show_plan import print_plan
from moe2dense.conversion.text_options import run_day
from moe2dense.conversion.training_text import has_prompts, with_training_text
from moe2dense.data.overlap import overlap_warning, seen_share
from moe2dense.families.resolve import fetch, resolve_teacher
from moe2dense.modeling.attention import attention_setting
from moe2dense.student.store import load_student
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher
from moe2dense.weights.fingerprint import checkpoint_fingerprint, text_hash


def run_conversion(settings: RunConfig, *, resume: bool = False, dry_run: bool = False) -> Result | Plan:
    """Convert as resolved settings say. Raises UserError for bad input; a stopped run continues with resume=True.

    Of several processes, started by torchrun, the first one writes the run folder and says what is done. All share the build, the
    targets, the training, the evaluation and the report's scores; what became of the experts, texts and the export are the
    first one's work, while the others wait.
    """
    check_settings(settings)
    with attention_setting(settings.attention), join_processes() as rank:
        return _run(settings, resume, dry_run, Console(quiet=rank > 0))


def resume_conversion(config: str | Path | None, options: dict[str, Any], *, dry_run: bool = False) -> Result | Plan:
    """Continue a run, fetched from its mirror first where that is newer than what is here. Raises UserError as `run_conversion`."""
    with join_processes() as rank:
        from_first(lambda: fetch_run(config, options, Console(quiet=rank > 0)))
        settings = resumed_settings(config=config, options=options)
        return run_conversion(settings, resume=True, dry_run=dry_run)


def _run(settings: RunConfig, resume: bool, dry_run: bool, console: Console) -> Result | Plan:
    """Convert, with whatever other processes have joined."""
    from_first(lambda: check_places(settings, resume))
    settings, note = for_stack(settings)
    if note:
        console.print(note, highlight=False, markup=False)
    plan = from_first(lambda: make_plan(settings))
    source = resolve_teacher(settings.model, settings.teacher.card)
    check_text(settings, source, plan.block)
    print_plan(plan, settings, console)
    if dry_run:
        return plan
    with (
        open_run(settings.out, settings, resume) as run,
        mirrored(run, settings, console),
        progress_for(console) as progress,
    ):
        options = settings.teacher
        teacher = load_teacher(
            from_first(lambda: fetch(source)),
            memory=options.memory,
            experts=options.experts,
            device=options.device,
            card=source.card,
            gpu_memory=options.gpu_memory,
        )
        run.save(placement=plan.placement.to_dict())
        run.save(teacher={"remarks": teacher.remarks, "ignored_tensors": teacher.ignored})
        text = load_text(settings, plan, teacher.tokenizer(), run_day(run))
        check_report_settings(settings, text, teacher)
        hashes = from_first(lambda: _hashes(teacher, text))
        run.check_inputs(**hashes)
        run.save(text={split: counts.to_dict() for split, counts in text.records.items()})
        for split, counts in text.records.items():
            console.print(f"{split} text: {counts.sentence()}", highlight=False, markup=False)
        seen = from_first(lambda: _seen_in_training(text))
        run.save(seen_in_training=seen)
        for warning in (shortfall(text, plan), *(overlap_warning(share, name) for name, share in seen.items())):
            if warning:
                console.print(f"[yellow]warning:[/] {warning}")
        plan, passed = _settled_extra_text(run, settings, plan, text, teacher)
        settings = replace(settings, train=replace(with_falling_features(settings.train, plan.extra), epochs=passed))
        job = Job(run, settings, plan, teacher, text, progress)
        stages.check_targets_disk(job)
        result = _stages(job)
    report_stage.show_result(run.folder, console)
    return result


def _settled_extra_text(run: Run, settings: RunConfig, plan: Plan, text: Text, teacher: Teacher) -> tuple[Plan, float]:
    """Return the plan with the share of text that the teacher writes on top, and the passes over both.

    A resumed run keeps its share; by rule nothing is written where no record can be continued.
    """
    planned = plan.extra
    if planned and settings.write.extra < 0 and not from_first(lambda: has_prompts(settings, plan, text, teacher)):
        planned = 0.0
    extra, tokens = float(run.manifest.get("extra_text", planned)), text.train.tokens
    run.save(extra_text=extra)
    written = replace(settings, write=replace(settings.write, extra=extra))
    return replace(plan, extra=extra), extra_text(written, tokens, plan.target.parameters, resident=False)[1]


def _hashes(teacher: Teacher, text: Text) -> dict[str, str]:
    """Return hashes of what every stage of a run reads."""
    texts = {"training_text": text.train, "held_out_text": text.valid, "out_of_distribution_text": text.ood}
    hashes = {name: text_hash(blocks) for name, blocks in texts.items() if blocks is not None}
    return {"teacher": checkpoint_fingerprint(teacher.path)} | hashes


def _seen_in_training(text: Text) -> dict[str, float]:
    """Return how much of each text that judges the student was also trained on."""
    judges = {"held-out": text.valid, "out-of-distribution": text.ood}
    return {name: seen_share(blocks, text.train) for name, blocks in judges.items() if blocks is not None}


def _stages(job: Job) -> Result:
    """Every stage in order. A finished one is read back from the run folder."""
    whole, job = job, progressive.last_stage(job)
    student = stages.build(job)
    scoring.write_token_counts(job)
    rows = {"teacher": scoring.score_teacher(job), "before": scoring.score(job, student)}
    choice: Choice | None = None
    last: dict[str, Any] = {}
    if job.plan.tokens:
        job = with_training_text(job, student)
        student, rows["student"], choice, last = _trained(job, student, rows["before"])
    else:
        rows["student"] = rows["before"]
    control: Path | None = None
    if job.settings.control:
        control, rows["control"] = stages.control(job)
        if job.settings.stages:
            rows["direct"] = scoring.score(job, progressive.direct(whole))
    rows |= scoring.score_baselines(job)

    report = report_stage.write_report(job, student, rows, choice, last, control)

    def write_model() -> tuple[Path, dict[str, Any]]:
        return report_stage.export_model(job, student, report, choice), report["rows"]

    model, table = from_first(write_model)
    exported, gained = (choice.exported, choice.gained) if choice else (BUILT, None)
    return Result(job.run.folder, model, job.run.folder / "report.html", table, exported, gained)


def _trained(
    job: Job, built: Student, before: scoring.TextScores
) -> tuple[Student, scoring.TextScores, Choice, dict[str, Any]]:
    """Train the student; return the one to export with its scores, the choice, and the last step's scores where it is another.

    The built student is exported where training did not bring it closer to its teacher.
    """
    student = stages.train(job, built)
    trained = job.run.finished("train-student")
    assert trained is not None, "training records what it did"
    choice = choose(float(before["valid"].kl), trained)
    job.run.save(choice=choice.to_dict())
    last = trained.get("last") or {}
    if choice.gained:
        return student, scoring.score(job, student), choice, last
    if not last:
        last = scoring.plain_scores(job, scoring.score(job, student))
    return load_student(job.run.folder / "build" / "student"), before, choice, last
