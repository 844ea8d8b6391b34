"""The stages of a conversion. Each reads its result back from the run folder when the run already has it."""

from typing import TYPE_CHECKING, Any

from moe2dense.config.schema import RunConfig
from moe2dense.conversion.job import Job
from moe2dense.distillation.regimes.registry import OWN_TEXT, make_regime

if TYPE_CHECKING:
    from moe2dense.distillation.regime import Regime

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe2dense.evaluation.reference import Reference
    from moe2dense.evaluation.scores import Scores
    from moe2dense.student.types import Student


def build(job: Job) -> "Student":
    """Build the student layer by layer beside the teacher."""
    from moe2dense.student.build.api import build_to_folder
    from moe2dense.student.store import load_student, save_student

    folder = job.run.folder / "build"
    if job.run.finished("build"):
        return load_student(folder / "student")
    settings = job.settings
    with job.timed("build") as entry:
        build_to_folder(
            training_teacher(job),
            to=job.target,
            data=job.text.build,
            folder=folder / "student",
            out=folder,
            init=settings.build.init,
            config=settings.build,
            seed=settings.seed,
            progress=lambda name, *counts, **numbers: job.progress(
                name, *counts, **{k: v for k, v in numbers.items() if k == "error"}
            ),
        )
        student = load_student(folder / "student")  # as a resumed run does, so that both train the same module
        if (
            job.intermediate_teacher is not None
        ):  # where the neurons of a dense intermediate_teacher come from says nothing of the teacher's experts
            student.provenance, student.teacher_path = [None] * len(student.provenance), str(job.teacher.path)
            save_student(student, folder / "student")
        entry |= {"tokens": student.build_tokens, "history": student.history}
    return student


def reference_for(job: Job, which: str) -> "Reference":
    """The teacher's final hidden states on held-out text, computed once per process."""
    from moe2dense.evaluation.reference import reference

    if which not in job.references:
        blocks = job.text.valid if which == "valid" else job.text.ood
        job.references[which] = reference(job.teacher, blocks)
    return job.references[which]


def token_counts(job: Job) -> Any:
    """How often each token id stands in the training text [V]."""
    import torch

    return torch.bincount(job.text.train.input_ids.flatten(), minlength=job.plan.shape.vocab_size)


def score(job: Job, student: Any) -> dict[str, "Scores"]:
    """A student's numbers on the held-out and, where given, the out-of-distribution text."""
    from moe2dense.evaluation.api import evaluate

    counts, seed = token_counts(job), job.settings.seed
    return {t: evaluate(student, reference_for(job, t), token_counts=counts, seed=seed) for t in _texts(job)}


def _texts(job: Job) -> list[str]:
    return ["valid"] if job.text.ood is None else ["valid", "ood"]


def score_teacher(job: Job) -> dict[str, "Scores"]:
    """The teacher's own row: its likelihood of the text; everything relative to itself is zero."""
    from moe2dense.evaluation.api import evaluate

    counts, seed = token_counts(job), job.settings.seed
    truths = {t: reference_for(job, t) for t in _texts(job)}
    return {t: evaluate(truth, truth, token_counts=counts, seed=seed) for t, truth in truths.items()}


def train(job: Job, student: "Student", row: str = "student") -> "Student":
    """Distil the student on the teacher's targets; returns it with the final weights."""
    from moe2dense.distillation.api import distill
    from moe2dense.student.store import load_student, save_student

    folder = job.run.folder if row == "student" else job.run.folder / row
    stage, final = f"train-{row}", folder / "checkpoints" / "final"
    if job.run.finished(stage):
        return load_student(final)
    settings = job.settings
    with job.timed(stage) as entry:
        result = distill(
            student,
            data=job.text.train,
            targets=training_targets(job),
            tokens=job.text.train.tokens,
            valid=job.text.valid,
            valid_targets=reference_for(job, "valid"),
            config=settings.train,
            seed=settings.seed,
            out=folder,
            resume=True,
            regime=regime_of(job),
            progress=lambda name, *rest, **numbers: job.progress(
                name if row == "student" else f"{name} {row}", *rest, **numbers
            ),
        )
        save_student(student, final)
        entry |= {
            "tokens": result.tokens,
            "steps": result.steps,
            "best_step": result.best_step,
            "history": result.history,
        }
    return student


def training_targets(job: Job) -> Any:
    """The teacher's targets on the training text: the store the user names, else one written to the run folder; None for hard labels alone."""
    from moe2dense.distillation.auto_features import features_to_store
    from moe2dense.distillation.regimes.registry import brings_targets
    from moe2dense.distillation.targets.mixture import MixedTargets
    from moe2dense.distillation.targets.store import open_targets, write_targets
    from moe2dense.losses.feature_spec import teacher_features

    settings = job.settings.train
    if not needs_targets(job.settings) or brings_targets(settings.regime, job.settings.regime):
        return None
    if settings.targets:
        return open_targets(settings.targets, job.text.train)
    draws = 1 if job.intermediate_teacher is not None else max(1, job.settings.teacher.draws)
    features = features_to_store(settings, job.target) if draws == 1 else ""  # of several answers there is none
    folder = job.run.folder / "targets"
    folders = [folder] if draws == 1 else [folder / f"draw-{draw}" for draw in range(draws)]
    if not job.run.finished("targets"):
        with job.timed("targets"):
            for draw, place in enumerate(folders):
                write_targets(
                    training_teacher(job, targets=True, draw=draw),
                    job.text.train,
                    place,
                    format=settings.target_format,
                    temperature=settings.temperature,
                    seed=job.settings.seed,
                    features=teacher_features(
                        features, job.target.config.num_hidden_layers, job.target.teacher.num_hidden_layers
                    ),
                    routing=[settings.token_weights] * bool(settings.token_weights),
                    progress=job.progress,
                )
    found = [open_targets(place, job.text.train) for place in folders]
    return found[0] if draws == 1 else MixedTargets([(1 / draws, one) for one in found])


def control(job: Job) -> "Student":
    """The same student from random neurons, trained the same way: what the build is worth."""
    from moe2dense.student.build.api import build_student

    settings = job.settings
    student = build_student(
        job.source, to=job.target, data=job.text.build, init="random", config=settings.build, seed=settings.seed
    )
    return train(job, student, "control") if job.plan.tokens else student


def regime_of(job: Any) -> "Regime | None":
    """The regime that a conversion's settings ask for, with the models it needs; a second student is built once and kept."""

    name, options = job.settings.train.regime, job.settings.regime
    teacher = training_teacher(job, targets=True) if name in OWN_TEXT else job.source
    return make_regime(name, options, teacher, second_student(job) if name == "mutual" else None)


def second_student(job: Any) -> Any:
    """The other student of mutual learning: a checkpoint, or built in another way from another seed."""

    from moe2dense.student.build.api import build_student
    from moe2dense.student.store import load_student, save_student

    peer, folder = job.settings.regime.peer, job.run.folder / "build" / "peer"
    if Path(peer).is_dir():
        from moe2dense.student.open import open_student

        return open_student(peer)
    if not job.run.finished("peer"):
        with job.timed("peer"):
            seed, build = job.settings.seed + 1, job.settings.build
            save_student(
                build_student(job.source, to=job.target, data=job.text.build, init=peer, config=build, seed=seed),
                folder,
            )
    return load_student(folder)


def needs_targets(settings: RunConfig) -> bool:
    """Whether training reads the teacher's distributions at all: hard labels alone do not."""
    return settings.train.alpha < 1 or bool(
        settings.train.alpha_schedule or settings.train.wanted_features or settings.train.select
    )


def training_teacher(job: Any, targets: bool = False, draw: int = 0) -> Any:
    """The teacher that the student learns from: with rounded experts, or for targets with other experts, where the settings say so.

    draw: which drawing of experts, where they are drawn. The student is always judged by the checkpoint as it is.
    """
    about = job.settings.teacher
    options: dict[str, Any] = {"quantize": about.quantize} if about.quantize else {}
    if targets and about.top_k:
        options["top_k"] = about.top_k
    if targets and about.draws:
        options |= {"draw": draw, "seed": job.settings.seed}
    if job.intermediate_teacher is not None or not options:
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
