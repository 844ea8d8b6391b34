"""The stages of a conversion. Each reads its result back from the run folder when the run already has it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moe2dense.common.processes import from_first, world
from moe2dense.common.units import parse_bytes
from moe2dense.config.schema import BuildConfig, RunConfig
from moe2dense.conversion.choice import BEST, LAST, load_checkpoint
from moe2dense.conversion.job import Job
from moe2dense.conversion.mirroring import copying
from moe2dense.conversion.scoring import TextScores, plain_scores, reference_for, score
from moe2dense.distillation.api import distill
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.distillation.cost import features_to_store
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.checks import brings_targets
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.mtp import keep_heads_of
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.formats import StoreOptions
from moe2dense.distillation.targets.mixture import MixedTargets
from moe2dense.distillation.targets.open import open_any_targets
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.distillation.targets.rolling import Order, RollingTargets, rolling_targets
from moe2dense.distillation.targets.served.server import TeacherServer, connect
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.distillation.targets.store import MANIFEST, open_targets, targets_room
from moe2dense.distillation.targets.write import write_targets
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.modeling.hooks import feature_name
from moe2dense.student.build.api import build_student, build_to_folder
from moe2dense.student.fit_defaults import heal_passes
from moe2dense.student.init_spec import base_and_steps
from moe2dense.student.open import open_student
from moe2dense.student.store import load_student, save_student
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

SERVED_K = 64  # log-probabilities of a position, where the settings say no number


def build_settings(job: Job) -> BuildConfig:
    """Return the settings of a run's builds: where training follows, their heal is short."""
    settings = job.settings.build
    return replace(settings, heal_epochs=heal_passes(settings.heal_epochs, trained=job.plan.tokens > 0))


def _done(job: Job, stage: str, *files: Path) -> bool:
    """Return whether a stage is finished and its files are still there; a stage whose files were removed is done again, alike."""
    return job.run.finished(stage) is not None and all(file.is_file() for file in files)


def build(job: Job) -> Student:
    """Build the student layer by layer beside the teacher."""
    folder = job.run.folder / "build"
    if _done(job, "build", folder / "student" / "student.json"):
        return load_student(folder / "student")

    def progress(name: str, done: int, total: int, **numbers: Any) -> None:
        job.progress(name, done, total, **{k: v for k, v in numbers.items() if k == "error"})

    settings = job.settings
    with job.timed("build") as entry:
        build_to_folder(
            training_teacher(job),
            to=job.target,
            data=job.text.build,
            folder=folder / "student",
            out=folder,
            init=settings.build.init,
            config=build_settings(job),
            seed=settings.seed,
            progress=progress,
        )
        student = load_student(folder / "student")  # as a resumed run does, so that both train the same module
        if job.intermediate_teacher is not None:
            # Where the neurons of a dense intermediate teacher come from says nothing of the teacher's experts.
            student = replace(student, provenance=[None] * len(student.provenance), teacher_path=str(job.teacher.path))
            from_first(partial(save_student, student, folder / "student"))
        entry |= {"tokens": student.build_tokens, "history": student.history}
    return student


def train(job: Job, student: Student, row: str = "student", built: Path | None = None) -> Student:
    """Distil the student on the teacher's targets; return it as it was closest to the teacher on held-out text.

    row: the student's row in the report; another than `student` is trained in a folder of that name. built: the student as it
    was before training; by default the run's. The stage's record has the KL of the last step and of the best checkpoint.
    """
    folder = job.run.folder if row == "student" else job.run.folder / row
    stage, final = f"train-{row}", folder / "checkpoints" / "final"
    if _done(job, stage, final / "student.json"):
        return load_student(final)

    def progress(name: str, done: int, total: int, **numbers: Any) -> None:
        job.progress(name if row == "student" else f"{name} {row}", done, total, **numbers)

    settings = job.settings
    with job.timed(stage) as entry:
        targets = training_targets(job)
        result = distill(
            student,
            data=job.text.train,
            targets=targets,
            tokens=job.text.train.tokens,
            valid=job.text.valid,
            valid_targets=reference_for(job, "valid"),
            config=replace(settings.train, **job.plan.memory_settings),
            seed=settings.seed,
            out=folder,
            resume=True,
            regime=regime_of(job),
            device=job.source.device,
            progress=progress,
            token_counts=job.text.token_counts,
            after_save=job.run.after_change,
        )
        student = _whole(job, student, built or job.run.folder / "build" / "student", folder)
        from_first(lambda: save_student(student, final))
        if isinstance(targets, RollingTargets):
            targets.finish()
        entry |= {
            "tokens": result.tokens,
            "steps": result.steps,
            "best_step": result.best_step,
            "history": result.history,
        }
        built = built or job.run.folder / "build" / "student"
        entry |= _keep_best(job, student, folder / "checkpoints", built, result.best_step, result.steps)
    return load_student(final)


def _whole(job: Job, student: Student, built: Path, folder: Path) -> Student:
    """Return the trained student with all its weights on every process, also where training left them spread."""
    if not job.settings.train.shard or world()[1] == 1:
        return student
    whole = load_student(built)
    Checkpoints(folder / "checkpoints").load_weights(whole.model)
    return whole


def _keep_best(
    job: Job, student: Student, checkpoints: Path, built: Path, best_step: int | None, steps: int
) -> dict[str, Any]:
    """Put the best checkpoint in the place of the last step's student where it is closer; return the KL of both.

    Both are judged as the report judges. {"exported": "last" | "best", "kl": {...}, "last": scores of the last step by text, where
    another is exported}.
    """
    last = score(job, student)
    kl: dict[str, float] = {LAST: float(last["valid"].kl)}
    folder = Checkpoints(checkpoints)
    if best_step is None or best_step in (0, steps) or best_step not in folder.steps():
        return {"exported": LAST, "kl": kl}
    best = load_checkpoint(student, checkpoints, best_step, built, job.settings.train)
    kl[BEST] = float(score(job, best)["valid"].kl)
    if kl[BEST] >= kl[LAST]:
        return {"exported": LAST, "kl": kl}

    def keep() -> None:
        save_student(best, checkpoints / "final")
        keep_heads_of(folder.load(best_step)[0], checkpoints.parent)

    from_first(keep)
    return {"exported": BEST, "kl": kl, "last": plain_scores(job, last)}


def control(job: Job) -> tuple[Path, TextScores]:
    """Make the same student from random FFNs and train it alike: what the build's neurons are worth.

    Attention, norms and embeddings are the teacher's, as the student's are. It gets the same end-to-end fit on the same tokens, the
    same training, and is taken where it is closest to the teacher, as the student is. Return its folder and its scores.
    """
    settings, folder = job.settings, job.run.folder / "control" / "build" / "student"
    if not _done(job, "build-control", folder / "student.json"):
        with job.timed("build-control") as entry:
            random = _built(job, control_init(settings.build.init), settings.seed)
            from_first(lambda: save_student(random, folder))
            entry |= {"history": load_student(folder).history}
    built = load_student(folder)
    scores = score(job, built)
    if not job.plan.tokens:
        return folder, scores
    trained_scores = score(job, train(job, built, "control", folder))
    if trained_scores["valid"].kl < scores["valid"].kl:
        return job.run.folder / "control" / "checkpoints" / "final", trained_scores
    return folder, scores


def control_init(init: str) -> str:
    """Return the control's --init: random FFNs, healed where the student is."""
    return "random+heal" if "heal" in base_and_steps(init) else "random"


def needs_targets(settings: RunConfig) -> bool:
    """Return whether training reads the teacher's distributions at all: hard labels alone do not."""
    train = settings.train
    return train.alpha < 1 or bool(train.alpha_schedule or train.wanted_features or train.select)


def _reads_targets(settings: RunConfig) -> bool:
    """Return whether training reads targets on its text: some regimes bring their own."""
    return needs_targets(settings) and not brings_targets(settings.train.regime, settings.regime)


def training_targets(job: Job) -> Targets | None:
    """Return the teacher's targets on the training text; None where training reads none.

    They are the store that the user names, else one that is written to the run folder: by the teacher, or by a server that runs it.
    """
    settings = job.settings.train
    if not _reads_targets(job.settings):
        return None
    if settings.targets:
        teacher = training_teacher(job, targets=True)
        return open_any_targets(settings.targets, job.text.train, teacher=teacher, room=targets_room(settings))
    if settings.targets_disk and (rolling := _rolling(job)) is not None:
        return rolling
    draws = 1 if job.intermediate_teacher is not None else max(1, job.settings.teacher.draws)
    folder = job.run.folder / "targets"
    folders = [folder] if draws == 1 else [folder / f"draw-{draw}" for draw in range(draws)]
    if not _done(job, "targets", *(place / MANIFEST for place in folders)):
        with job.timed("targets"):
            _store_targets(job, folders)
    stores = [open_targets(place, job.text.train) for place in folders]
    return stores[0] if draws == 1 else MixedTargets([(1 / draws, store) for store in stores])


def check_targets_disk(job: Job) -> None:
    """Raise UserError where --targets-disk has no room for one step's targets, before anything is computed."""
    if job.settings.train.targets_disk and not job.settings.train.targets and _reads_targets(job.settings):
        _rolling(job)


def _rolling(job: Job) -> RollingTargets | None:
    """Return targets that take no more disk than the settings allow; None where those of all text take no more."""
    settings, target, text = job.settings.train, job.target, job.text.train
    layers = target.config.num_hidden_layers, target.teacher.num_hidden_layers
    features = tuple(feature_name(f) for f in teacher_features(features_to_store(settings, target), *layers))
    options = StoreOptions(settings.target_format, settings.temperature, seed=job.settings.seed, features=features)
    return rolling_targets(
        training_teacher(job, targets=True),
        text,
        job.run.folder / "targets",
        parse_bytes(settings.targets_disk, "--targets-disk"),
        Order(len(text), max(1, settings.batch // job.plan.block), settings.epochs, job.settings.seed),
        options,
        job.progress,
    )


def _store_targets(job: Job, folders: list[Path]) -> None:
    """Write the teacher's targets; into several folders, where its experts are drawn several times."""
    progress = copying(job.progress, job.run.after_change)
    if job.settings.endpoint.url:
        write_served_targets(served_teacher(job), job.text.train, job.teacher.tokenizer(), folders[0], progress)
        return
    settings, target = job.settings.train, job.target
    # Features of several answers have no mean to learn from.
    features = features_to_store(settings, target) if len(folders) == 1 else ""
    layers = target.config.num_hidden_layers, target.teacher.num_hidden_layers
    for draw, folder in enumerate(folders):
        write_targets(
            training_teacher(job, targets=True, draw=draw),
            job.text.train,
            folder,
            format=settings.target_format,
            temperature=settings.temperature,
            seed=job.settings.seed,
            features=teacher_features(features, *layers),
            routing=[settings.token_weights] * bool(settings.token_weights),
            progress=progress,
        )


def regime_of(job: Job) -> Regime | None:
    """Return the regime that a run's settings ask for, with the models it needs; None for learning from fixed text."""
    name = job.settings.train.regime
    if not name:
        return None
    row = REGIMES[name]
    peer = second_student(job) if row.needs_peer else None
    if row.writes_text and job.settings.endpoint.url:
        return make_regime(name, job.settings.regime, None, peer, served_teacher(job))
    teacher = training_teacher(job, targets=True) if row.writes_text else job.source
    return make_regime(name, job.settings.regime, teacher, peer)


def served_teacher(job: Job) -> TeacherServer:
    """Reach the server that runs the teacher. Raises UserError as `connect` does."""
    endpoint = job.settings.endpoint
    return connect(
        endpoint.url, endpoint.k or SERVED_K, endpoint.model, endpoint.kind, parallel=endpoint.parallel,
        per_second=endpoint.rate,
    )  # fmt: skip


def second_student(job: Job) -> Student:
    """Return the other student of mutual learning: a checkpoint, or built once in another way from another seed."""
    settings, folder = job.settings, job.run.folder / "build" / "peer"
    peer = settings.regime.peer
    if Path(peer).is_dir():
        return open_student(peer)
    if not _done(job, "peer", folder / "student.json"):
        with job.timed("peer"):
            other = _built(job, peer, settings.seed + 1)
            from_first(lambda: save_student(other, folder))
    return load_student(folder)


def _built(job: Job, init: str, seed: int) -> Student:
    """Return a student of the run's shape, built on its text in another way."""
    return build_student(
        job.source, to=job.target, data=job.text.build, init=init, config=build_settings(job), seed=seed
    )


def training_teacher(job: Job, targets: bool = False, draw: int = 0) -> Teacher:
    """Return the teacher that the student learns from, which need not be the checkpoint as it is.

    Where the settings say so its experts are rounded, and for targets other experts are taken. draw: which drawing of experts, where they are drawn. The student is always judged by the checkpoint as it is.
    """
    teacher = job.settings.teacher
    options: dict[str, Any] = {"quantize": teacher.quantize} if teacher.quantize else {}
    if targets and teacher.top_k:
        options["top_k"] = teacher.top_k
    if targets and teacher.draws:
        options |= {"draw": draw, "seed": job.settings.seed}
    if job.intermediate_teacher is not None or not options:
        return job.source
    return load_teacher(
        job.teacher.path,
        memory=teacher.memory,
        gpu_memory=teacher.gpu_memory,
        experts=teacher.experts,
        device=teacher.device,
        card=job.teacher.card,
        **options,
    )
