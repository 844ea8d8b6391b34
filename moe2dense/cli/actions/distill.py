"""Train a dense checkpoint as `moe2dense distill` asks."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from moe2dense.cli.actions.distill_request import DistillRequest
from moe2dense.cli.actions.distill_sources import Material, Setting, gather
from moe2dense.common.devices import moved_to, pick_device
from moe2dense.common.object_store import is_url
from moe2dense.common.processes import from_first, join_processes, world
from moe2dense.common.progress import progress_for
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.choice import load_checkpoint
from moe2dense.conversion.mirroring import check_mirror, fetch_folder, mirrored_folder
from moe2dense.data.blocks import Blocks
from moe2dense.data.overlap import overlap_warning, seen_share
from moe2dense.distillation.api import distill
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.mtp import copy_heads, keep_heads_of
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.store import read_manifest
from moe2dense.distillation.trainer import TrainResult
from moe2dense.errors import UserError
from moe2dense.evaluation.likelihood import answer_nll
from moe2dense.exporting.api import export
from moe2dense.modeling.attention import attention_setting
from moe2dense.student.locate import student_folder
from moe2dense.student.open import open_student
from moe2dense.student.types import Student


def run_distillation(request: DistillRequest) -> None:
    """Train the student, export it to OUT/model, and print what was done. Raises UserError for bad input.

    Under torchrun all processes train; the first one writes and prints.
    """
    with attention_setting(request.settings.attention), join_processes() as rank:
        console = Console(quiet=rank > 0)
        from_first(lambda: _check_mirror(request, console))
        with mirrored_folder(request.settings.mirror, request.out, console) as copy:
            _run(request, console, copy)


def _check_mirror(request: DistillRequest, console: Console) -> None:
    """Refuse a mirror that cannot be used, and continue from it where it is newer than --out. Raises UserError."""
    url, out = request.settings.mirror, request.out
    if request.resume:
        fetch_folder(url, out, (out / "checkpoints").is_dir(), console)
    check_mirror(url, out, request.resume)


def _run(request: DistillRequest, console: Console, copy: Callable[[], None] | None) -> None:
    """Train with whatever other processes have joined. copy: what copies --out to its mirror."""
    if request.targets is not None and is_url(request.targets):
        read_manifest(request.targets)  # before anything is loaded
    student = open_student(request.student)
    tokenizer = student.teacher_path or str(student_folder(request.student))
    device = pick_device(request.settings.teacher.device)
    with progress_for(console) as progress:
        material = gather(Setting(request, student, tokenizer, console, progress))
        if material.valid is not None and (warning := overlap_warning(seen_share(material.valid, material.data))):
            console.print(f"[yellow]warning:[/] {warning}")
        before = None if material.answers is None else _answer_nll(student.model, material.answers, device)
        result = distill(
            student,
            material.teacher,
            material.data,
            tokens=material.data.tokens,
            targets=material.targets,
            valid=material.valid,
            valid_targets=material.valid_targets,
            config=material.train,
            seed=request.settings.seed,
            out=request.out,
            resume=request.resume,
            progress=progress,
            regime=_regime(request.settings, material),
            device=device,
            after_save=copy,
        )
    if material.train.shard and world()[1] > 1:
        student = open_student(request.student)
        Checkpoints(request.out / "checkpoints").load_weights(student.model)
    student, step = _closest(request, student, result, material.train)
    exported = from_first(lambda: export(student, request.out / "model", tokenizer=tokenizer, overwrite=request.resume))
    from_first(lambda: copy_heads(request.out, exported.path))
    if before is not None and material.answers is not None:
        after = _answer_nll(student.model, material.answers, device)
        console.print(
            f"held-out answers: {before:.3f} nats per token before training, {after:.3f} nats per token after"
        )
    console.print(f"{result.steps} steps over {result.tokens} tokens{_which(result, step)}; model: {exported.path}")


def _closest(
    request: DistillRequest, student: Student, result: TrainResult, config: TrainConfig
) -> tuple[Student, int]:
    """Return the student as it was closest to the teacher on held-out text, and after how many steps that was."""
    folder, best = Checkpoints(request.out / "checkpoints"), result.best_step
    if best is None or best == result.steps or best not in folder.steps():
        return student, result.steps
    from_first(lambda: keep_heads_of(folder.load(best)[0], request.out))
    return load_checkpoint(student, folder.folder, best, Path(request.student), config), best


def _which(result: TrainResult, step: int) -> str:
    """Return what to say of the step that is exported, where it is not the last."""
    if step == result.steps:
        return ""
    kl = {row["step"]: row["valid_kl"] for row in result.history if "valid_kl" in row}
    measured = f"held-out KL {kl[step]:.4g}, after the last step {kl[max(kl)]:.4g}"
    if step == 0:
        return f"; training brought the student no closer to its teacher, and the model is the student as it was ({measured})"
    return f"; the model is the student after step {step} ({measured})"


def _answer_nll(model: PreTrainedModel, answers: Blocks, device: torch.device) -> float:
    """Return a model's mean nats per learnt token, computed on `device` where it fits there."""
    with moved_to(model, device):
        return answer_nll(model, answers)


def _regime(settings: RunConfig, material: Material) -> Regime | None:
    """The regime that the config asks for; a second student is a checkpoint here."""
    name, options = material.train.regime, settings.regime
    if not name:
        return None
    peer = None
    if name in REGIMES and REGIMES[name].needs_peer:
        if not Path(options.peer).is_dir():
            raise UserError(
                f"regime.peer must be the folder of a dense checkpoint to learn with; found {options.peer!r}"
            )
        peer = open_student(options.peer)
    return make_regime(name, options, material.teacher, peer, material.server)
