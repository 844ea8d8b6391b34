"""A training checkpoint of a run as a student: the built student with the weights of that step, nothing of the optimiser."""

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

    run = next((p for p in folder.absolute().parents if (p / "walk" / "student" / "student.json").is_file()), None)
    if run is None:
        raise UserError(
            f"{folder} is a training checkpoint outside its run; pass it inside the run folder it came from"
        )
    student = load_student(run / "walk" / "student")
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
