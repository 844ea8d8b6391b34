"""What a finished run says of itself: the report, its parts that need the models once more, and the exported checkpoint."""

import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from moe2dense.common.devices import moved_to
from moe2dense.common.jsonable import clean
from moe2dense.common.processes import from_first
from moe2dense.common.versions import versions
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.config.serving import ExportConfig
from moe2dense.conversion.choice import Choice
from moe2dense.conversion.configure import CONFIG
from moe2dense.conversion.job import Job
from moe2dense.conversion.scoring import TextScores, reference_for
from moe2dense.conversion.stack_check import StackCheck, check_export
from moe2dense.conversion.stages import training_targets
from moe2dense.data.frequency import count_tokens
from moe2dense.distillation.regimes.mtp import copy_heads
from moe2dense.distillation.targets.protocols import HiddenStates
from moe2dense.distillation.targets.store import StoredTargets
from moe2dense.errors import UserError
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.judge import Judge
from moe2dense.evaluation.reference import AnyModel, Reference
from moe2dense.evaluation.samples import side_by_side
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.skill_probes import fact_probes, text_probes, tokenised
from moe2dense.evaluation.skills import measure_skills
from moe2dense.evaluation.transfer.measure import measure_transfer
from moe2dense.exporting.api import export
from moe2dense.exporting.card_info import card_info
from moe2dense.modeling.head import head_on
from moe2dense.reporting.assemble import assemble_report
from moe2dense.reporting.html import save_report
from moe2dense.reporting.rating_sheet import write_sheet
from moe2dense.reporting.report_file import Report, read_report
from moe2dense.reporting.terminal import print_report
from moe2dense.student.store import load_student
from moe2dense.student.types import Student
from moe2dense.weights.fingerprint import checkpoint_fingerprint, text_hash, weight_hashes


def write_report(
    job: Job,
    student: Student,
    rows: dict[str, TextScores],
    choice: Choice | None = None,
    last: Mapping[str, Any] | None = None,
    control: Path | None = None,
) -> Report:
    """Write report.html and report.json from everything the run measured; return the report.

    Processes that have joined must all call it: they share the forward passes over text.

    choice: which student is exported, where one was trained. last: scores of the last step by text, where another is exported.
    control: folder of the control.
    """
    stages = job.run.manifest["stages"]
    model = student.model
    facts = {
        "parameters": job.plan.target.parameters,
        "architecture": type(model).__name__,
        "host": student.card.title,
        "method": student.method,
        "width": job.plan.target.width,
        "layers": model.config.num_hidden_layers,
        "moe_shaped": student.card.moe_shaped,
    }
    measured = {
        "transfer": transfer(job, student, rows),
        "samples": samples(job, student),
        "skills": skills(job, student, control),
        "train_scores": score_training_text(job, student),
    }

    def write() -> Report:
        report = assemble_report(
            config=job.settings,
            plan=job.plan.to_dict(),
            teacher_remarks=job.teacher.remarks,
            student=facts,
            rows={name: scores["valid"] for name, scores in rows.items()},
            ood={name: scores["ood"] for name, scores in rows.items() if "ood" in scores},
            build=[*stages.get("build", {}).get("history", [])],
            choice=choice.to_dict() if choice else None,
            last=last or {},
            history=stages.get("train-student", {}).get("history", []),
            control_history=stages.get("train-control", {}).get("history", []),
            hashes=hashes(job),
            allow_loss=job.settings.evaluate.allow_loss,
            versions=versions(),
            timings={name: entry["seconds"] for name, entry in stages.items() if "seconds" in entry},
            cost=plain_cost(job),
            data=_text_facts(job),
            command=command_line(job.settings),
            tokenizer=job.teacher.tokenizer(),
            **measured,
        )
        save_report(report, job.run.folder)
        return report

    return from_first(write)


def samples(job: Job, student: Student) -> dict[str, Any] | None:
    """Let student and teacher continue held-out prompts; leaves a blind rating sheet and its key in the run folder.

    None where none were asked for, or the text is too short.
    """
    options, seed = job.settings.evaluate, job.settings.seed
    if not options.samples:
        return None
    run = job.settings.teacher
    judge = Judge(options.judge, run.memory, run.device, run.gpu_memory) if options.judge else None
    with job.timed("samples"):
        texts = side_by_side(
            student.model,
            job.teacher,
            job.text.valid,
            options,
            tokenizer=job.teacher.tokenizer(),
            seed=seed,
            judge=judge,
        )
    if texts is None:
        return None
    return texts | {"sheet": from_first(lambda: [p.name for p in write_sheet(texts, job.run.folder, seed)])}


def skills(job: Job, student: Student, control: Path | None) -> dict[str, Any] | None:
    """Let teacher, student, student before training and control solve small exact tasks; None where none are asked for."""
    count, seed, text = job.settings.evaluate.skills, job.settings.seed, job.text
    if not count:
        return None
    tokenizer = job.teacher.tokenizer()
    counts = count_tokens(text.train) if text.token_counts is None else text.token_counts
    probes = [
        *tokenised(text_probes(count, seed), tokenizer),
        *fact_probes(text.train, counts, tokenizer, count, seed),
    ]

    def models() -> Iterator[tuple[str, AnyModel]]:
        yield "teacher", job.teacher
        folders = {"before": job.run.folder / "build" / "student"} | ({} if control is None else {"control": control})
        opened = ((name, load_student(folder)) for name, folder in folders.items())
        for name, model in itertools.chain([("student", student)], opened):
            with moved_to(model.model, job.teacher.device):
                yield name, model

    with job.timed("skills"):
        return measure_skills(models(), probes)


def hashes(job: Job) -> dict[str, str]:
    """Return hashes of what the result depends on: the teacher's weights (sampled) and the text.

    Those of the exported weights join after the export.
    """
    text = job.text
    parts = {"train text": text.train, "build text": text.build, "valid text": text.valid, "ood text": text.ood}
    weights = {"teacher (sampled)": checkpoint_fingerprint(job.teacher.path)}
    return weights | {name: text_hash(blocks) for name, blocks in parts.items() if blocks is not None}


def score_training_text(job: Job, student: Student, most: int = 24) -> Scores | None:
    """Score the student on a little of the text it was trained on, against the stored targets.

    None where these hold no hidden states, are an intermediate teacher's, or were removed once the training was done.
    """
    if not job.plan.tokens or job.intermediate_teacher is not None:
        return None
    folder = job.run.folder / "targets"
    if job.run.finished("targets") and not from_first(folder.is_dir):  # one answer for all processes
        return None
    store = training_targets(job)
    if not isinstance(store, StoredTargets) or store.head is None:
        return None
    rows = list(range(min(most, len(store))))
    blocks = job.text.train[rows]
    targets = store.batch(rows)
    assert isinstance(targets, HiddenStates), "a store with a head holds hidden states"
    hidden = targets.hidden.view(*blocks.input_ids.shape, -1)
    with job.metered("evaluate"):
        return evaluate(
            student,
            Reference(blocks, hidden, head_on(store.head, job.teacher.device)),
            token_counts=job.text.token_counts,
            seed=job.settings.seed,
        )


def transfer(job: Job, student: Student, rows: dict[str, TextScores]) -> dict[str, Any] | None:
    """Measure what each expert knew and what of it the student holds, on the held-out text.

    None where layers or hidden width were pruned.
    """
    config, shape = student.model.config, job.plan.shape
    if (config.num_hidden_layers, config.hidden_size) != (shape.num_hidden_layers, shape.hidden_size):
        return None

    def measure() -> dict[str, Any]:
        return measure_transfer(
            job.teacher,
            job.text.valid,
            student,
            before=load_student(job.run.folder / "build" / "student"),
            scores=rows["student"]["valid"],
            before_scores=rows["before"]["valid"],
            tokenizer=job.teacher.tokenizer(),
            seed=job.settings.seed,
            progress=job.progress,
        ).to_dict()

    with job.timed("transfer"):
        return from_first(measure)


def plain_cost(job: Job) -> dict[str, Any]:
    """Return what each stage has cost so far, as plain values."""
    return {stage: cost.to_dict() for stage, cost in job.run.cost().items()}


def _text_facts(job: Job) -> dict[str, Any]:
    data, text = job.settings.data, job.text
    paths = {"train": data.path or DEFAULT_CORPUS, "valid": data.valid or data.path or DEFAULT_CORPUS, "ood": data.ood}
    blocks = {"train": text.train, "valid": text.valid, "ood": text.ood}
    sizes = {k: {"path": paths[k], "blocks": len(b), "tokens": b.tokens} for k, b in blocks.items() if b is not None}
    if written := job.run.manifest.get("written_blocks"):
        sizes["train"] |= {"written_blocks": written}
    read = {k: {"records": c.to_dict(), "read": c.sentence()} for k, c in text.records.items()}
    seen = job.run.manifest.get("seen_in_training") or {}
    learnt = {
        k: {"seen_in_training": seen[n]}
        for k, n in (("valid", "held-out"), ("ood", "out-of-distribution"))
        if n in seen
    }
    return {k: size | read.get(k, {}) | learnt.get(k, {}) for k, size in sizes.items()}


def command_line(settings: RunConfig) -> str:
    """Return the command that makes the run again; after a call from Python or a resumption, with the run's settings as --config."""
    typed = sys.argv[1:]
    if Path(sys.argv[0]).stem in ("moe2dense", "__main__") and "--resume" not in typed:
        return shlex.join(["moe2dense", *typed])
    config = str(Path(settings.out) / CONFIG)
    return shlex.join(["moe2dense", "convert", settings.model, "--config", config, "--out", f"{settings.out}-again"])


def export_model(job: Job, student: Student, report: Report, choice: Choice | None = None) -> Path:
    """Write the deployable checkpoint, whole and checked. A quantised one is judged too, and joins the report as a row.

    choice: which student it is. The built one was there before any heads, so none go beside it.
    """
    options, folder = job.settings.export, job.run.folder / "model"
    done = job.run.finished("export")
    failed = done is not None and done.get("stack", {}).get("failure")
    if done is not None and not failed and all((folder / name).is_file() for name in done.get("files", ())):
        return folder  # where its files were removed, or a stack did not take them, they are written again

    def score_quantized(model: PreTrainedModel) -> dict[str, Any]:
        scores = evaluate(
            model, reference_for(job, "valid"), token_counts=job.text.token_counts, seed=job.settings.seed
        )
        report["rows"][f"student, {options.quantize}"] = scores.to_dict()
        return scores.to_dict()

    with job.timed("export") as entry:
        exported = export(
            student,
            folder,
            tokenizer=str(job.teacher.path),
            info=card_info(report),
            dtype=options.dtype,
            format=options.format,
            quantize=options.quantize or None,
            shard_size=options.shard_size,
            text=job.text.train[:64].input_ids if options.quantize else None,
            score=score_quantized if options.quantize else None,
            overwrite=True,
            device=job.source.device,
        )
        if choice is not None and choice.gained:
            copy_heads(job.run.folder, folder)
        check = _checked_in_stack(student, folder, options)
        report["run"]["hashes"] |= weight_hashes(folder / f for f in exported.files)
        report["run"]["cost"] = plain_cost(job)
        report["student"] |= {"bytes": exported.bytes} | (
            {"quantized": exported.quantized} if exported.quantized else {}
        )
        if check is not None:
            report["student"]["stack"] = entry["stack"] = check.to_dict()
        save_report(clean(report), job.run.folder)
        entry |= {"files": exported.files, "checked": exported.checked, "quantized": exported.quantized}
    if check is not None and check.failure:
        raise UserError(f"--for {check.stack}: {check.failure}; the export is in {folder}")
    return folder


def _checked_in_stack(student: Student, folder: Path, options: ExportConfig) -> StackCheck | None:
    """Try the export in the stack that it is for; None where it is for none, or is quantised."""
    if not options.stack or options.quantize:
        return None
    return check_export(student, folder, options.stack)


def show_result(folder: Path, console: Console) -> None:
    """Print the measured table and where everything is."""
    report = read_report(folder)
    print_report(report, console)
    if "stack" in report["student"]:
        console.print(StackCheck(**report["student"]["stack"]).sentence(), highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}", highlight=False)
