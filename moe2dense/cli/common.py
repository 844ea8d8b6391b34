"""What several commands need: the teacher, its text, a student from a folder."""

from typing import TYPE_CHECKING, Any

from moe2dense.errors import UserError

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks


def open_teacher(
    name: str, *, memory: str = "auto", experts: str = "auto", device: str = "auto", card: str = ""
) -> Any:
    """The teacher that `name` means, ready to stream. Raises UserError as resolve_teacher and load_teacher do."""
    from moe2dense.families.resolve import fetch, resolve_teacher
    from moe2dense.teacher.load import load_teacher

    found = resolve_teacher(name, card)
    return load_teacher(fetch(found), memory=memory, experts=experts, device=device, card=found.card)


def read_text(path: str, teacher: Any, block: int, split: str, tokens: int | None, seed: int = 0) -> "Blocks":
    """Blocks of one split for this teacher's tokenizer; block 0 = min(2048, the teacher's max positions)."""
    from moe2dense.data.load import load_blocks

    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", 2048)
    if block > longest:
        raise UserError(f"--block {block} is more than the teacher's {longest} positions")
    return load_blocks(path, teacher.tokenizer(), block or min(2048, longest), split, tokens=tokens, seed=seed)
