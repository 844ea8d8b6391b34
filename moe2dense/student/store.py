"""Write a built student and read it again: an fp32 checkpoint that transformers loads, and where its neurons come from."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe2dense.common.files import content_errors, read_json_object, whole_folder
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host
from moe2dense.modeling.load import load_model, quiet
from moe2dense.student.types import LayerProvenance, Student

_REMEDY = "build the student again"
_KINDS = {"host": str, "teacher": str, "method": str, "build_tokens": int, "layers": int, "history": list}
_PROVENANCE_FIELDS = [f.name for f in dataclasses.fields(LayerProvenance)]


def _provenance_tensors(provenance: list[LayerProvenance | None]) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{name}": getattr(entry, name).contiguous()
        for layer, entry in enumerate(provenance)
        if entry is not None
        for name in _PROVENANCE_FIELDS
    }


def save_student(student: Student, folder: str | Path) -> Path:
    """Write a student to `folder`, which is replaced as a whole. Raises UserError when it cannot be written."""

    def write(temporary: Path) -> None:
        with quiet():
            student.model.save_pretrained(temporary)

    return _save(student, folder, write)


def save_parts(student: Student, folder: str | Path, parts: Iterable[dict[str, torch.Tensor]]) -> Path:
    """Write a student that is not in memory: its tensors come in `parts`, by name, each a file of the checkpoint.

    Raises UserError when the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        places: dict[str, str] = {}
        size = 0
        for number, tensors in enumerate(parts):
            name = f"model-part-{number:05d}.safetensors"
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary / name, {"format": "pt"}
            )
            size += sum(t.nbytes for t in tensors.values())
            places |= dict.fromkeys(tensors, name)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        student.model.config.save_pretrained(temporary)
        if student.model.generation_config is not None:
            student.model.generation_config.save_pretrained(temporary)

    return _save(student, folder, write)


def _save(student: Student, folder: str | Path, write: Callable[[Path], None]) -> Path:
    folder = Path(folder)
    metadata = {
        "host": student.card.name,
        "teacher": student.teacher_path,
        "method": student.method,
        "build_tokens": student.build_tokens,
        "layers": len(student.provenance),
        "history": student.history,
    }
    with whole_folder(folder, overwrite=True) as temporary:
        write(temporary)
        save_file(_provenance_tensors(student.provenance), temporary / "provenance.safetensors")
        (temporary / "student.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def load_student(folder: str | Path) -> Student:
    """Return the student that `save_student` wrote, in fp32. Raises UserError when the folder holds none."""
    folder = Path(folder)
    if not (folder / "student.json").is_file():
        raise UserError(f"{folder} holds no built student (no student.json)")
    metadata = read_json_object(folder / "student.json", _REMEDY)
    model = load_model(folder)
    with content_errors(folder / "student.json", _REMEDY):
        for name, kind in _KINDS.items():
            if type(metadata[name]) is not kind:
                raise TypeError(f"{name} is {metadata[name]!r}, not {kind.__name__}")
        if metadata["layers"] != model.config.num_hidden_layers:
            raise ValueError(
                f"it speaks of {metadata['layers']} layers, the model has {model.config.num_hidden_layers}"
            )
        return Student(
            model=model,
            card=student_host(metadata["host"]),
            provenance=_read_provenance(folder / "provenance.safetensors", metadata["layers"]),
            teacher_path=metadata["teacher"],
            method=metadata["method"],
            build_tokens=metadata["build_tokens"],
            history=metadata["history"],
        )


def _read_provenance(file: Path, layers: int) -> list[LayerProvenance | None]:
    """Return where the neurons of each layer come from; None for a layer that was not built. Raises UserError."""
    try:
        with content_errors(file, _REMEDY):
            tensors = load_file(file)
            return [
                LayerProvenance(**{name: tensors[f"{layer}.{name}"] for name in _PROVENANCE_FIELDS})
                if f"{layer}.source_expert" in tensors
                else None
                for layer in range(layers)
            ]
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}; {_REMEDY}") from error
