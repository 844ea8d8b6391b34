"""What a finished run says of itself: the report, its parts that need the models once more, and the exported checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.cards import nearest
from moe2dense.errors import UserError
from moe2dense.planning import DEFAULT_CORPUS
from moe2dense.stages import Job, Text, reference_for, score, token_counts, training_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe2dense.config import RunConfig
    from moe2dense.evaluation import Scores
    from moe2dense.student.types import Student


def check_report_settings(settings: "RunConfig", text: Text, teacher: Any) -> None:
    """Refuse what the report could not say in the end, before the student is built. Raises UserError naming the flag."""
    from moe2dense.baseline import check_baselines
    from moe2dense.judge import check_judge

    options = settings.evaluate
    held = [d for part in (text.valid, text.ood) if part is not None for d in part.domains]
    check_allowed(options.allow_loss, held)
    check_baselines(options.baseline, teacher.tokenizer())
    if options.judge:
        check_judge(options.judge, teacher.path)


def check_allowed(allowed: "Sequence[str]", domains: "Sequence[str]") -> None:
    """Raises UserError for domains that the held-out text does not have, and where nothing would be left to judge."""
    known = sorted(set(domains) - {""})
    unknown = [d for d in allowed if d not in known]
    if unknown and not known:
        raise UserError(
            f"--allow-loss {','.join(allowed)}: the held-out text has no domains; its records need a `domain` beside their text"
        )
    if unknown:
        raise UserError(
            f"--allow-loss names {', '.join(map(repr, unknown))}, which the held-out text does not have{nearest(unknown[0], known)}; "
            f"its domains are {', '.join(known)}"
        )
    if allowed and not set(domains) - set(allowed):
        raise UserError(
            f"--allow-loss {','.join(allowed)} names every domain of the held-out text; leave out what is to survive"
        )


def score_baselines(job: Job) -> dict[str, dict[str, "Scores"]]:
    """The numbers of every --baseline, by the row's name. One is in memory at a time."""
    from moe2dense.baseline import open_baseline, row_names

    return {row: score(job, open_baseline(name)) for row, name in row_names(job.settings.evaluate.baseline).items()}


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
    from moe2dense.judge import Judge
    from moe2dense.reporting.sheet import write_sheet
    from moe2dense.sidebyside import side_by_side

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
    from moe2dense.fingerprint import checkpoint_fingerprint, text_hash

    text = job.text
    parts = {"train text": text.train, "walk text": text.walk, "valid text": text.valid, "ood text": text.ood}
    found = {"teacher (sampled)": checkpoint_fingerprint(job.teacher.path)}
    return found | {name: text_hash(blocks) for name, blocks in parts.items() if blocks is not None}


def score_training_text(job: Job, student: "Student", most: int = 24) -> "Scores | None":
    """The student on a little of the text it was trained on, against the stored targets; None where these hold no hidden states."""
    from moe2dense.evaluation import Reference, evaluate

    if not job.plan.tokens or job.leader is not None:  # a leader's targets are not the teacher's
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


def command_line(settings: "RunConfig") -> str:
    """The command as the user could type it again; a call from Python is the run's own settings as --config."""
    if Path(sys.argv[0]).stem in ("moe2dense", "__main__"):
        return shlex.join(["moe2dense", *sys.argv[1:]])
    config = str(Path(settings.out) / "moe2dense.toml")
    return shlex.join(["moe2dense", "convert", settings.model, "--config", config, "--out", f"{settings.out}-again"])


def export_model(job: Job, student: "Student", report: dict[str, Any]) -> Path:
    """The deployable checkpoint, written whole and checked. A quantised one is judged too, and joins the report as a row."""
    from moe2dense.evaluation import evaluate
    from moe2dense.exporting import export
    from moe2dense.exporting.info import card_info
    from moe2dense.fingerprint import weight_hashes
    from moe2dense.regimes.mtp import copy_heads
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
        copy_heads(job.run.folder, folder)
        report["run"]["hashes"] |= weight_hashes(folder / f for f in done.files)
        report["student"] |= {"bytes": done.bytes} | ({"quantized": done.quantized} if done.quantized else {})
        write(clean(report), job.run.folder)
        entry |= {"files": done.files, "checked": done.checked, "quantized": done.quantized}
    return folder


def show_result(folder: Path, console: Any) -> None:
    """The measured table and where everything is."""
    from moe2dense.reporting import print_report, read_report

    print_report(read_report(folder), console)
    console.print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}", highlight=False)
