"""What several commands need: the teacher, its text, a student from a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.errors import UserError

if TYPE_CHECKING:
    from moe2dense.data import Blocks
    from moe2dense.student.types import Student


def open_teacher(
    name: str, *, memory: str = "auto", experts: str = "auto", device: str = "auto", card: str = ""
) -> Any:
    """The teacher that `name` means, ready to stream. Raises UserError as resolve_teacher and load_teacher do."""
    from moe2dense.resolve import fetch, resolve_teacher
    from moe2dense.teacher.load import load_teacher

    found = resolve_teacher(name, card)
    return load_teacher(fetch(found), memory=memory, experts=experts, device=device, card=found.card)


def read_text(path: str, teacher: Any, block: int, split: str, tokens: int | None, seed: int = 0) -> "Blocks":
    """Blocks of one split for this teacher's tokenizer; block 0 = min(2048, the teacher's max positions)."""
    from moe2dense.data import load_blocks

    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", 2048)
    if block > longest:
        raise UserError(f"--block {block} is more than the teacher's {longest} positions")
    return load_blocks(path, teacher.tokenizer(), block or min(2048, longest), split, tokens=tokens, seed=seed)


def is_run(folder: Path) -> bool:
    """Is this the folder of a conversion?"""
    return (folder / "run.json").is_file()


def student_folder(path: str) -> Path:
    """The newest whole student in a run (trained, else built), or the checkpoint folder itself.

    Raises UserError when there is neither.
    """
    folder = Path(path)
    if is_run(folder):
        for found in (folder / "checkpoints" / "final", folder / "walk" / "student"):
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

    from moe2dense.cards import StudentCard, student_cards
    from moe2dense.exporting.intermediate import is_training_checkpoint, open_intermediate
    from moe2dense.exporting.verify import quiet
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
