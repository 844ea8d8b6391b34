"""What a run's settings change about its text and about the teacher that its student learns from."""

import dataclasses
import json
from typing import Any

from moe2dense.config import RunConfig
from moe2dense.errors import UserError
from moe2dense.generation.filters import parse_band
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.selection import parse_selection, select_blocks
from moe2dense.regimes.choose import OWN_TEXT, brings_targets
from moe2dense.regimes.seqkd import written_text
from moe2dense.run import atomic_write
from moe2dense.units import show_count


def check_text_settings(settings: RunConfig) -> None:
    """Refuse settings of [write] and train.select that mean nothing. Raises UserError."""
    write = settings.write
    if not 0 <= write.share <= 1:
        raise UserError(f"write.share must lie between 0 and 1; found {write.share:g}")
    if write.share:
        Sampling(write.temperature, write.top_p, write.beams)
        parse_band(write.nll)
    if not 0 <= write.duplicates <= 1:
        raise UserError(f"write.duplicates must lie between 0 and 1; found {write.duplicates:g}")
    if parse_selection(settings.train.select) and brings_targets(settings.train.regime, settings.regime):
        raise UserError(
            f"train.select chooses by the teacher's targets of the text, which the {settings.train.regime} regime has none of; leave one out"
        )
    check_draws(settings)
    if settings.train.targets and (write.share or settings.train.select):
        raise UserError(
            "train.targets are of the data as it is; leave out write.share and train.select, or the targets"
        )


def check_draws(settings: RunConfig) -> None:
    """Raises UserError where several answers of a teacher with drawn experts cannot be averaged."""
    draws, train = settings.teacher.draws, settings.train
    if draws < 0:
        raise UserError(f"teacher.draws must not be negative; found {draws}")
    if draws < 2:
        return
    for name, found, plain in (
        ("regime", train.regime, train.regime not in OWN_TEXT),
        ("features", train.features, not train.wanted_features),
        ("token_weights", train.token_weights, not train.token_weights),
        ("select", train.select, not train.select),
        ("target_format", train.target_format, train.target_format in ("hidden", "full")),
    ):
        if not plain:
            raise UserError(
                f"teacher.draws {draws} averages stored distributions, which train.{name} = {found!r} cannot be used with; "
                f"set one of them otherwise (draws = 1 works with all)"
            )


def describe(settings: RunConfig, plan: Any) -> str:
    """What of the text, or of the teacher that writes the targets, is not the plain one; '' when nothing is."""
    said, teacher = [], settings.teacher
    if settings.write.share and plan.tokens:
        count = show_count(round(settings.write.share * plan.tokens))
        said.append(
            f"the teacher first writes {count} tokens of the training text, in one pass over its weights for each new token"
        )
    if settings.train.select and plan.tokens:
        said.append(f"of the text only {settings.train.select} is trained on, as many steps as on all of it")
    if teacher.quantize:
        said.append(
            f"the lesson is taught by experts rounded to {teacher.quantize} as they are read; the full teacher judges"
        )
    if teacher.draws:
        how = f"{teacher.top_k or 'as many'} experts per token{'' if teacher.top_k else ' as ever'}"
        times = f", {teacher.draws} times, and their distributions averaged" if teacher.draws > 1 else ""
        said.append(f"targets come from {how}, drawn from the router's distribution{times}")
    elif teacher.top_k:
        said.append(f"targets come from {teacher.top_k} experts per token")
    return "; ".join(said)


def needs_targets(settings: RunConfig) -> bool:
    """Whether training reads the teacher's distributions at all: hard labels alone do not."""
    return settings.train.alpha < 1 or bool(
        settings.train.alpha_schedule or settings.train.wanted_features or settings.train.select
    )


def lesson_teacher(job: Any, targets: bool = False, draw: int = 0) -> Any:
    """The teacher that the student learns from: with rounded experts, or for targets with other experts, where the settings say so.

    draw: which drawing of experts, where they are drawn. The student is always judged by the checkpoint as it is.
    """
    about = job.settings.teacher
    options: dict[str, Any] = {"quantize": about.quantize} if about.quantize else {}
    if targets and about.top_k:
        options["top_k"] = about.top_k
    if targets and about.draws:
        options |= {"draw": draw, "seed": job.settings.seed}
    if job.leader is not None or not options:
        return job.source
    from moe2dense.teacher.load import load_teacher

    return load_teacher(
        job.teacher.path,
        memory=about.memory,
        experts=about.experts,
        device=about.device,
        card=job.teacher.card,
        **options,
    )


def prepare_text(job: Any, student: Any) -> None:
    """Put what the teacher writes into the training text, then keep the blocks that are chosen; a resumed run reads both back."""
    if job.settings.write.share:
        job.text = dataclasses.replace(job.text, train=written_text(job))
    if job.settings.train.select:
        _select(job, student)


def _select(job: Any, student: Any) -> None:
    from moe2dense.stages import training_targets

    whole, selection = job.text.train, parse_selection(job.settings.train.select)
    assert selection is not None
    record = job.run.folder / "selection.json"
    targets = training_targets(job)
    if not job.run.finished("select"):
        with job.timed("select") as entry:
            rows, divergence = select_blocks(student.model, targets, whole, selection)
            entry |= {"kept": len(rows), "of": len(whole), "divergence": float(divergence[rows].mean())}
            entry["divergence_of_all"] = float(divergence.mean())
            atomic_write(record, json.dumps({"rows": rows, "divergence": [round(float(d), 6) for d in divergence]}))
    rows = json.loads(record.read_text())["rows"]
    job.text = dataclasses.replace(job.text, train=whole[rows])
    train = dataclasses.replace(job.settings.train, epochs=job.settings.train.epochs * len(whole) / len(rows))
    job.settings = dataclasses.replace(job.settings, train=train)  # as many steps as on the whole text
