"""What several commands need: the teacher and its text."""

from rich.console import Console
from rich.markup import escape

from moe2dense.common.units import parse_count
from moe2dense.config.schema import DataConfig
from moe2dense.config.teacher import TeacherConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.families.resolve import fetch, resolve_teacher
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher

_LONGEST_BLOCK = 2048


def open_teacher(name: str, options: TeacherConfig) -> Teacher:
    """Open the teacher that `name` means, ready to stream. Raises UserError as resolve_teacher and load_teacher do."""
    teacher = resolve_teacher(name, options.card)
    return load_teacher(
        fetch(teacher), memory=options.memory, experts=options.experts, device=options.device, card=teacher.card,
        gpu_memory=options.gpu_memory,
    )  # fmt: skip


def block_length(teacher: Teacher, block: int) -> int:
    """Return the tokens per block: --block, else min(2048, the teacher's max positions). Raises UserError beyond what it takes."""
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", _LONGEST_BLOCK)
    if block > longest:
        raise UserError(f"--block {block} is more than the teacher's {longest} positions")
    return block or min(_LONGEST_BLOCK, longest)


def read_text(path: str, teacher: Teacher, data: DataConfig, split: str, tokens: int | None, seed: int = 0) -> Blocks:
    """Read blocks of one split for this teacher's tokenizer, and print what was skipped.

    Those not of the train split are spread over many passages. data: length of the blocks, and how text is read.
    """
    length, counts, spread = block_length(teacher, data.block), TextCounts(), split != "train"
    options = text_options_for(teacher.path, data)
    blocks = load_blocks(
        path, teacher.tokenizer(), length, split, tokens, seed, spread=spread, options=options, counts=counts
    )
    print_skipped(counts, path)
    return blocks


def print_skipped(counts: TextCounts, path: str) -> None:
    """Print what was read of a text where some of it was skipped."""
    if counts.skipped:
        text = f"{path}: {counts.sentence()}"
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(text)}", highlight=False)


def token_count(tokens: str | None) -> int | None:
    """Return --tokens as a number; None where it was not given. Raises UserError."""
    return parse_count(tokens, "--tokens") if tokens else None
