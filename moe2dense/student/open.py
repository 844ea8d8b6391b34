"""Open a student from a run, a step of its training, or any dense checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe2dense.errors import UserError

if TYPE_CHECKING:
    from moe2dense.student.types import Student


def is_training_checkpoint(folder: Path) -> bool:
    """Is this a step of a run's training (RUN/checkpoints/step-000050)?"""
    return (folder / "weights.safetensors").is_file() and (folder / "state.json").is_file()


def open_intermediate(folder: Path) -> "Student":
    """The student at one step of training. Raises UserError where the run's built student is gone or adapters were trained."""
    from safetensors.torch import load_file

    from moe2dense.student.store import load_student

    run = next((p for p in folder.absolute().parents if (p / "build" / "student" / "student.json").is_file()), None)
    if run is None:
        raise UserError(
            f"{folder} is a training checkpoint outside its run; pass it inside the run folder it came from"
        )
    student = load_student(run / "build" / "student")
    weights = load_file(folder / "weights.safetensors")
    parameters = dict(student.model.named_parameters())
    for name, value in weights.items():
        if name not in parameters:
            raise UserError(
                f"{folder} holds {name}, which is not the student's (adapters?); finish the run, which merges them"
            )
        if parameters[name].shape != value.shape:
            raise UserError(f"{folder} holds {name} in another shape than the run's built student")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    student.method += f", training step {json.loads((folder / 'state.json').read_text())['step']}"
    return student


def is_run(folder: Path) -> bool:
    """Is this the folder of a conversion?"""
    return (folder / "run.json").is_file()


def student_folder(path: str) -> Path:
    """The newest whole student in a run (trained, else built), or the checkpoint folder itself.

    Raises UserError when there is neither.
    """
    folder = Path(path)
    if is_run(folder):
        for found in (folder / "checkpoints" / "final", folder / "build" / "student"):
            if (found / "student.json").is_file():
                return found
        raise UserError(f"{path} is a run without a built student yet; finish it with `moe2dense convert ... --resume`")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path!r} is neither a run nor a checkpoint (no run.json, no config.json)")
    return folder


def open_student(path: str) -> "Student":
    """The student of a run or of a step of its training, or a dense checkpoint, in fp32. Raises UserError when the weights cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe2dense.families.cards import StudentCard, student_cards
    from moe2dense.modeling.load import quiet
    from moe2dense.student.store import load_student
    from moe2dense.student.types import Student

    if is_training_checkpoint(Path(path)):
        return open_intermediate(Path(path))
    folder = student_folder(path)
    if (folder / "student.json").is_file():
        return load_student(folder)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    kind = model.config.model_type
    card = next((c for c in student_cards().values() if c.model_type == kind), StudentCard(kind, kind, model_type=kind))
    return Student(model, card, [None] * model.config.num_hidden_layers, "", "checkpoint", 0)
