"""Open a student from a run, from a step of its training, or from any dense checkpoint."""

from pathlib import Path

import torch

from moe2dense.common.files import read_json_object
from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard, student_cards
from moe2dense.modeling.load import load_model
from moe2dense.student.locate import is_training_checkpoint, student_folder
from moe2dense.student.store import load_student
from moe2dense.student.types import Student
from moe2dense.weights.finite import refuse_not_finite
from moe2dense.weights.sharded import load_sharded
from moe2dense.weights.tensors import read_tensors


def open_student(path: str) -> Student:
    """Return the student of a run or of a step of its training, or a dense checkpoint as a student, in fp32.

    Raises UserError when the weights cannot be read.
    """
    if is_training_checkpoint(Path(path)):
        return open_intermediate(Path(path))
    folder = student_folder(path)
    if (folder / "student.json").is_file():
        return load_student(folder)
    model = load_model(folder)
    kind = model.config.model_type
    card = next((c for c in student_cards().values() if c.model_type == kind), StudentCard(kind, kind, model_type=kind))
    return Student(model, card, [None] * model.config.num_hidden_layers, "", "checkpoint", 0)


def open_intermediate(folder: Path) -> Student:
    """Return the student at one step of training.

    Raises UserError where the run's built student is gone, adapters were trained, or the checkpoint is damaged.
    """
    run = next((p for p in folder.absolute().parents if (p / "build" / "student" / "student.json").is_file()), None)
    if run is None:
        raise UserError(
            f"{folder} is a training checkpoint outside its run; pass it inside the run folder it came from"
        )
    student = load_student(run / "build" / "student")
    parts, file = folder / "weights", folder / "weights.safetensors"
    weights = load_sharded(parts) if parts.is_dir() else read_tensors(file, "take another step")
    parameters = dict(student.model.named_parameters())
    for name, value in weights.items():
        if name not in parameters:
            raise UserError(
                f"{folder} holds {name}, which is not the student's (adapters?); finish the run, which merges them"
            )
        if parameters[name].shape != value.shape:
            raise UserError(f"{folder} holds {name} in another shape than the run's built student")
        refuse_not_finite(value, f"{folder} cannot be used: tensor {name!r}", "take an earlier step")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    step = read_json_object(folder / "state.json", "take another step").get("step", "unknown")
    student.method += f", training step {step}"
    return student
