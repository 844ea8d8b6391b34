"""Find the student in the folder of a run. No torch is loaded here."""

from pathlib import Path

from moe2dense.common.files import read_json_object
from moe2dense.errors import UserError
from moe2dense.weights.files import refuse_adapter


def is_training_checkpoint(folder: Path) -> bool:
    """Return whether this is a step of a run's training (RUN/checkpoints/step-000050)."""
    weights = (folder / "weights.safetensors").is_file() or (folder / "weights").is_dir()  # whole, or in parts
    return weights and (folder / "state.json").is_file()


def is_run(folder: Path) -> bool:
    """Return whether this is the folder of a conversion."""
    return (folder / "run.json").is_file()


def _exported(run: Path) -> str:
    """Return which student a run chose for its export ("built", "best" or "last"), '' where it has not chosen yet."""
    choice = read_json_object(run / "run.json", "restore it, or pass the folder of a student").get("choice")
    return str(choice.get("exported", "")) if isinstance(choice, dict) else ""


def student_folder(path: str) -> Path:
    """Return the student of a run, or the checkpoint folder itself.

    Of a run it is the one that was exported: the trained one, unless training brought it no closer to its teacher; of an unfinished
    run the newest that is whole. Raises UserError when there is neither.
    """
    folder = Path(path)
    if is_run(folder):
        trained, built = folder / "checkpoints" / "final", folder / "build" / "student"
        for student in (built, trained) if _exported(folder) == "built" else (trained, built):
            if (student / "student.json").is_file():
                return student
        raise UserError(f"{path} is a run without a built student yet; finish it with `moe2dense convert ... --resume`")
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        raise UserError(f"{path!r} is neither a run nor a checkpoint (no run.json, no config.json)")
    return folder
