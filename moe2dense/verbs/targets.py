"""`moe2dense targets`: the teacher's distributions on a text, stored for training without the teacher."""

from pathlib import Path
from typing import Literal


def targets(
    teacher: str,
    /,
    *,
    data: str,
    out: Path,
    format: Literal["hidden", "sampled", "topk", "full"] = "hidden",
    tokens: str = "500k",
    block: int = 0,
    seed: int = 0,
    memory: str = "auto",
    experts: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
) -> None:
    """Stream the teacher once and store its targets for `moe2dense distill --targets`.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id, or known name
    data: text: folder with train/valid/test files, one file, or a hub id
    out: folder of the store; an unfinished one is continued
    format: hidden and full serve every loss; sampled forward KL; topk forward KL and hard labels
    tokens: how many teacher positions
    block: tokens per block; default min(2048, the teacher's max positions)
    seed: order of the text
    memory: budget for teacher weights and hidden states
    experts: how experts are computed: auto, streamed, grouped_mm, megablocks
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    """
    from rich.console import Console

    from moe2dense.progress import progress_for
    from moe2dense.targets import write_targets
    from moe2dense.units import parse_count, show_bytes
    from moe2dense.verbs.common import open_teacher, read_text

    console = Console()
    model = open_teacher(teacher, memory=memory, experts=experts, device=device, card=teacher_card)
    blocks = read_text(data, model, block, "train", parse_count(tokens, "--tokens"), seed)
    with progress_for(console) as progress:
        write_targets(model, blocks, out, format=format, progress=progress)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    console.print(
        f"{out}: {format} targets of {blocks.tokens} tokens, {show_bytes(size)} ({size / blocks.tokens:.0f} bytes a token)"
    )
