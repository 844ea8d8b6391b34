"""Train a dense checkpoint as `moe2dense distill` asks."""

from pathlib import Path

from rich.console import Console

from moe2dense.cli.actions.distill_request import DistillRequest
from moe2dense.cli.actions.distill_sources import Material, Setting, gather
from moe2dense.common.progress import progress_for
from moe2dense.config.schema import RunConfig
from moe2dense.distillation.api import distill
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.mtp import copy_heads
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.errors import UserError
from moe2dense.evaluation.likelihood import answer_nll
from moe2dense.exporting.api import export
from moe2dense.student.locate import student_folder
from moe2dense.student.open import open_student


def run_distillation(request: DistillRequest) -> None:
    """Train the student, export it to OUT/model, and print what was done. Raises UserError for bad input."""
    student = open_student(request.student)
    tokenizer = student.teacher_path or str(student_folder(request.student))
    console = Console()
    with progress_for(console) as progress:
        material = gather(Setting(request, student, tokenizer, console, progress))
        before = None if material.answers is None else answer_nll(student.model, material.answers)
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
        )
    exported = export(student, request.out / "model", tokenizer=tokenizer, overwrite=request.resume)
    copy_heads(request.out, exported.path)
    if before is not None and material.answers is not None:
        after = answer_nll(student.model, material.answers)
        console.print(
            f"held-out answers: {before:.3f} nats per token before training, {after:.3f} nats per token after"
        )
    console.print(f"{result.steps} steps over {result.tokens} tokens; model: {exported.path}")


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
    return make_regime(name, options, material.teacher, peer)
