"""What a finished run says of itself: the report, its parts that need the models once more, and the exported checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.config.schema import DEFAULT_CORPUS
from moe2dense.conversion.job import Job
from moe2dense.conversion.stages import reference_for, score, token_counts, training_targets

if TYPE_CHECKING:
    from moe2dense.config.schema import RunConfig
    from moe2dense.evaluation.scores import Scores
    from moe2dense.student.types import Student


def score_baselines(job: Job) -> dict[str, dict[str, "Scores"]]:
    """The numbers of every --baseline, by the row's name. One is in memory at a time."""
    from moe2dense.evaluation.baselines import open_baseline, row_names

    return {row: score(job, open_baseline(name)) for row, name in row_names(job.settings.evaluate.baseline).items()}


def write_report(job: Job, student: "Student", rows: dict[str, dict[str, "Scores"]]) -> dict[str, Any]:
    """report.html and report.json from everything the run measured; returns the report."""
    from moe2dense.common.versions import versions
    from moe2dense.reporting import assemble
    from moe2dense.reporting.html import write

    stages = job.run.manifest["stages"]
    model = student.model
    about = {
        "parameters": job.plan.target.parameters,
        "architecture": type(model).__name__,
        "host": student.card.title,
        "method": student.method,
        "width": job.plan.target.width,
        "layers": model.config.num_hidden_layers,
        "moe_shaped": student.card.moe_shaped,
    }
    report = assemble(
        config=job.settings,
        plan=job.plan.to_dict(),
        student=about,
        rows={name: found["valid"] for name, found in rows.items()},
        ood={name: found["ood"] for name, found in rows.items() if "ood" in found},
        history=stages.get("train-student", {}).get("history", []),
        control_history=stages.get("train-control", {}).get("history", []),
        transfer=transfer(job, student, rows),
        samples=samples(job, student),
        hashes=hashes(job),
        allow_loss=job.settings.evaluate.allow_loss,
        train_scores=score_training_text(job, student),
        versions=versions(),
        timings={name: entry["seconds"] for name, entry in stages.items() if "seconds" in entry},
        data=_about_text(job),
        command=command_line(job.settings),
        tokenizer=job.teacher.tokenizer(),
    )
    write(report, job.run.folder)
    return report


def samples(job: Job, student: "Student") -> dict[str, Any] | None:
    """Student and teacher continue held-out prompts; leaves a blind rating sheet and its key in the run folder."""
    from moe2dense.evaluation.judge import Judge
    from moe2dense.evaluation.samples import side_by_side
    from moe2dense.reporting.rating_sheet import write_sheet

    options, seed = job.settings.evaluate, job.settings.seed
    if not options.samples:
        return None
    judge = Judge(options.judge, job.settings.teacher.memory, job.settings.teacher.device) if options.judge else None
    with job.timed("samples"):
        found = side_by_side(
            student.model,
            job.teacher,
            job.text.valid,
            options,
            tokenizer=job.teacher.tokenizer(),
            seed=seed,
            judge=judge,
        )
    if found is None:
        return None
    return found | {"sheet": [p.name for p in write_sheet(found, job.run.folder, seed)]}


def hashes(job: Job) -> dict[str, str]:
    """What the result depends on: the teacher's weights (sampled) and the text; the exported weights join after the export."""
    from moe2dense.weights.fingerprint import checkpoint_fingerprint, text_hash

    text = job.text
    parts = {"train text": text.train, "build text": text.build, "valid text": text.valid, "ood text": text.ood}
    found = {"teacher (sampled)": checkpoint_fingerprint(job.teacher.path)}
    return found | {name: text_hash(blocks) for name, blocks in parts.items() if blocks is not None}


def score_training_text(job: Job, student: "Student", most: int = 24) -> "Scores | None":
    """The student on a little of the text it was trained on, against the stored targets; None where these hold no hidden states."""
    from moe2dense.evaluation.api import evaluate
    from moe2dense.evaluation.reference import Reference

    if (
        not job.plan.tokens or job.intermediate_teacher is not None
    ):  # a intermediate_teacher's targets are not the teacher's
        return None
    store = training_targets(job)
    if store is None or store.head is None:
        return None
    rows = list(range(min(most, len(store))))
    blocks = job.text.train[rows]
    hidden = store.batch(rows).hidden.view(*blocks.input_ids.shape, -1)
    return evaluate(
        student, Reference(blocks, hidden, store.head), token_counts=token_counts(job), seed=job.settings.seed
    )


def transfer(job: Job, student: "Student", rows: dict[str, dict[str, "Scores"]]) -> dict[str, Any] | None:
    """What each expert knew and what of it the student holds, on the held-out text; None where layers or hidden width were pruned."""
    from moe2dense.evaluation.transfer.measure import measure_transfer
    from moe2dense.student.store import load_student

    config, shape = student.model.config, job.plan.shape
    if (config.num_hidden_layers, config.hidden_size) != (shape.num_hidden_layers, shape.hidden_size):
        return None
    with job.timed("transfer"):
        found = measure_transfer(
            job.teacher,
            job.text.valid,
            student,
            before=load_student(job.run.folder / "build" / "student"),
            scores=rows["student"]["valid"],
            before_scores=rows["before"]["valid"],
            tokenizer=job.teacher.tokenizer(),
            seed=job.settings.seed,
            progress=job.progress,
        )
    return found.to_dict()


def _about_text(job: Job) -> dict[str, Any]:
    data, text = job.settings.data, job.text
    paths = {"train": data.path or DEFAULT_CORPUS, "valid": data.valid or data.path or DEFAULT_CORPUS, "ood": data.ood}
    blocks = {"train": text.train, "valid": text.valid, "ood": text.ood}
    return {k: {"path": paths[k], "blocks": len(b), "tokens": b.tokens} for k, b in blocks.items() if b is not None}


def command_line(settings: "RunConfig") -> str:
    """The command as the user could type it again; a call from Python is the run's own settings as --config."""
    if Path(sys.argv[0]).stem in ("moe2dense", "__main__"):
        return shlex.join(["moe2dense", *sys.argv[1:]])
    config = str(Path(settings.out) / "moe2dense.toml")
    return shlex.join(["moe2dense", "convert", settings.model, "--config", config, "--out", f"{settings.out}-again"])


def export_model(job: Job, student: "Student", report: dict[str, Any]) -> Path:
    """The deployable checkpoint, written whole and checked. A quantised one is judged too, and joins the report as a row."""
    from moe2dense.common.jsonable import clean
    from moe2dense.distillation.regimes.mtp import copy_heads
    from moe2dense.evaluation.api import evaluate
    from moe2dense.exporting.api import export
    from moe2dense.exporting.card_info import card_info
    from moe2dense.reporting.html import write
    from moe2dense.weights.fingerprint import weight_hashes

    options, folder = job.settings.export, job.run.folder / "model"
    if job.run.finished("export"):
        return folder

    def score_quantized(model: Any) -> dict[str, Any]:
        found = evaluate(model, reference_for(job, "valid"), token_counts=token_counts(job), seed=job.settings.seed)
        report["rows"][f"student, {options.quantize}"] = found.to_dict()
        return found.to_dict()

    with job.timed("export") as entry:
        done = export(
            student,
            folder,
            tokenizer=str(job.teacher.path),
            info=card_info(report),
            dtype=options.dtype,
            format=options.format,
            quantize=options.quantize or None,
            shard_size=options.shard_size,
            text=job.text.train.input_ids[:64] if options.quantize else None,
            score=score_quantized if options.quantize else None,
            overwrite=True,
        )
        copy_heads(job.run.folder, folder)
        report["run"]["hashes"] |= weight_hashes(folder / f for f in done.files)
        report["student"] |= {"bytes": done.bytes} | ({"quantized": done.quantized} if done.quantized else {})
        write(clean(report), job.run.folder)
        entry |= {"files": done.files, "checked": done.checked, "quantized": done.quantized}
    return folder


def show_result(folder: Path, console: Any) -> None:
    """The measured table and where everything is."""
    from moe2dense.reporting.assemble import read_report
    from moe2dense.reporting.terminal import print_report

    print_report(read_report(folder), console)
    console.print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}", highlight=False)
