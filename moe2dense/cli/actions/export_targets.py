"""Write a store of targets as DistillKit reads it, as `moe2dense export STORE --format distillkit` asks."""

from pathlib import Path

from rich.console import Console

from moe2dense.common.progress import progress_for
from moe2dense.common.units import parse_count, show_bytes
from moe2dense.config.schema import DataConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.captured.write import write_captured
from moe2dense.distillation.targets.store import open_targets, read_manifest
from moe2dense.exporting.tokenizer import load_tokenizer


def run_export_targets(
    store: str, out: Path, *, data: str, tokenizer: str, tokens: str | None, seed: int, k: int, overwrite: bool
) -> None:
    """Write the targets in `store` to `out` and print how they are packed. Raises UserError for bad input."""
    block = read_manifest(store)["block"]
    source = load_tokenizer(tokenizer)
    count = parse_count(tokens, "--tokens") if tokens else None
    blocks = load_blocks(data, source, block, "train", count, seed, options=text_options_for(tokenizer, DataConfig()))
    targets = open_targets(store, blocks, tokenizer=source)
    console = Console()
    with progress_for(console) as progress:
        packing = write_captured(targets, blocks, source, out, k, overwrite=overwrite, progress=progress)
    size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    console.print(
        f"{out}: {blocks.tokens} tokens, the {packing.k} likeliest of each, {show_bytes(size)} ({size / blocks.tokens:.0f} bytes a token)"
    )
