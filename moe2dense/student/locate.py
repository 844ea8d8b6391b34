"""Find the student in the folder of a run. No torch is loaded here."""

from pathlib import Path

from moe2dense.errors import UserError
from moe2dense.weights.files import refuse_adapter


def is_training_checkpoint(folder: Path) -> bool:
    """Return whether this is a step of a run's training (RUN/checkpoints/step-000050)."""
    return (folder / "weights.safetensors").is_file() and (folder / "state.json").is_file()


def is_run(folder: Path) -> bool:
    """Return whether this is the folder of a conversion."""
    return (folder / "run.json").is_file()


def student_folder(path: str) -> Path:
    """Return the newest whole student in a run (trained, else built), or the checkpoint folder itself.

    Raises UserError when there is neither.
    """
    folder = Path(path)
    if is_run(folder):
        for student in (folder / "checkpoints" / "final", folder / "build" / "student"):
            if (student / "student.json").is_file():
                return student
        raise UserError(f"{path} is a run without a built student yet; finish it with `moe2dense convert ... --resume`")
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        raise UserError(f"{path!r} is neither a run nor a checkpoint (no run.json, no config.json)")
    return folder
