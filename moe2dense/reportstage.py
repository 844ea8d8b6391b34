"""What a finished run says of itself: the report, its parts that need the models once more, and the exported checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.planning import DEFAULT_CORPUS
from moe2dense.stages import Job, reference_for, token_counts, training_targets

if TYPE_CHECKING:
    from moe2dense.evaluation import Scores
    from moe2dense.student.types import Student


def write_report(job: Job, student: "Student", rows: dict[str, dict[str, "Scores"]]) -> dict[str, Any]:
    """report.html and report.json from everything the run measured; returns the report."""
    from moe2dense.reporting import assemble, write
    from moe2dense.verbs.doctor import versions

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
        train_scores=score_training_text(job, student),
        versions=versions(),
        timings={name: entry["seconds"] for name, entry in stages.items() if "seconds" in entry},
        data=_about_text(job),
        command=command_line(),
        tokenizer=job.teacher.tokenizer(),
    )
    write(report, job.run.folder)
    return report


def score_training_text(job: Job, student: "Student", most: int = 24) -> "Scores | None":
    """The student on a little of the text it was trained on, against the stored targets; None where these hold no hidden states."""
    from moe2dense.evaluation import Reference, evaluate

    if not job.plan.tokens:
        return None
    store = training_targets(job)
    if store.head is None:
        return None
    rows = list(range(min(most, len(store))))
    blocks = job.text.train[rows]
    hidden = store.batch(rows).hidden.view(*blocks.input_ids.shape, -1)
    return evaluate(
        student, Reference(blocks, hidden, store.head), token_counts=token_counts(job), seed=job.settings.seed
    )


def transfer(job: Job, student: "Student", rows: dict[str, dict[str, "Scores"]]) -> dict[str, Any] | None:
    """What each expert knew and what of it the student holds, on the held-out text; None where layers or hidden width were pruned."""
    from moe2dense.reporting.transfer import measure_transfer
    from moe2dense.student.store import load_student

    config, shape = student.model.config, job.plan.shape
    if (config.num_hidden_layers, config.hidden_size) != (shape.num_hidden_layers, shape.hidden_size):
        return None
    with job.timed("transfer"):
        found = measure_transfer(
            job.teacher,
            job.text.valid,
            student,
            before=load_student(job.run.folder / "walk" / "student"),
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


def command_line() -> str:
    """The command as the user could type it again."""
    return (
        shlex.join(["moe2dense", *sys.argv[1:]])
        if Path(sys.argv[0]).stem in ("moe2dense", "__main__")
        else "moe2dense.convert(...)"
    )


def export_model(job: Job, student: "Student", report: dict[str, Any]) -> Path:
    """The deployable checkpoint, written whole and checked. A quantised one is judged too, and joins the report as a row."""
    from moe2dense.evaluation import evaluate
    from moe2dense.exporting import export
    from moe2dense.exporting.info import card_info
    from moe2dense.reporting import write
    from moe2dense.reporting.assemble import clean

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
        report["student"] |= {"bytes": done.bytes} | ({"quantized": done.quantized} if done.quantized else {})
        write(clean(report), job.run.folder)
        entry |= {"files": done.files, "checked": done.checked, "quantized": done.quantized}
    return folder


def show_result(folder: Path, console: Any) -> None:
    """The measured table and where everything is."""
    from moe2dense.reporting import print_report, read_report

    print_report(read_report(folder), console)
    console.print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}", highlight=False)
