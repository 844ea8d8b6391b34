"""Write text with a teacher, as `moe2dense generate` asks."""

from pathlib import Path

from rich.console import Console

from moe2dense.cli.actions.common import block_length, open_teacher
from moe2dense.common.processes import join_processes
from moe2dense.common.progress import progress_for
from moe2dense.common.units import parse_count
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.generation.dataset import summary, write_text


def run_generation(name: str, data: str, out: Path, tokens: str, settings: RunConfig) -> None:
    """Let the teacher `name` continue `data` into the folder `out`, and print what was written. Raises UserError."""
    count, options = parse_count(tokens, "--tokens"), settings.teacher
    with join_processes() as rank:
        console = Console(quiet=rank > 0)
        teacher = open_teacher(name, options)
        block = block_length(teacher, settings.data.block)
        with progress_for(console) as progress:
            write_text(
                teacher, out, data, settings.write, count, block=block, seed=settings.seed, progress=progress,
                options=text_options_for(teacher.path, settings.data),
            )  # fmt: skip
    totals = summary(out)
    dropped = ", ".join(f"{n} {reason}" for reason, n in totals["dropped"].items()) or "none"
    console.print(
        f"{out}: {totals['texts']} texts of {totals['tokens']} tokens from {totals['prompts']} prompts (dropped: {dropped}); "
        f"train on them with --data {out} --valid TEXT",
        highlight=False,
    )
