"""`moe2dense distill` where no logits can be compared: completions from a file, an endpoint, or a teacher with another tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from moe2dense.config.schema import TrainConfig, WriteConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.cross_tokenizer import cross_targets
from moe2dense.generation.completions import answer_blocks, ask_endpoint, read_completions
from moe2dense.generation.dataset import write_text
from moe2dense.generation.endpoint import Endpoint


def hard_labels(settings: TrainConfig) -> TrainConfig:
    """The settings for text alone."""
    return dataclasses.replace(
        settings, alpha=1.0, alpha_schedule="", temperature=1.0, temperature_schedule="", features=""
    )


def from_completions(
    file: Path, tokenizer: Any, block: int, tokens: int | None, seed: int, console: Any
) -> tuple[Blocks, Blocks | None]:
    """Blocks of a .jsonl file of completions, and a held-out part."""
    records, warning = read_completions(file)
    if warning:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    console.print(f"{len(records)} completions, learnt as hard labels (alpha 1): no teacher distributions are known")
    return answer_blocks(records, tokenizer, block, tokens, seed)


def from_endpoint(
    url: str, model: str, data: str, folder: Path, write: WriteConfig, tokenizer: Any, block: int, tokens: int | None,
    seed: int, console: Any, progress: Any,
) -> tuple[Blocks, Blocks | None]:  # fmt: skip
    """Blocks of an OpenAI-compatible server's answers to the prompts in `data`, and a held-out part."""
    most = write.new_tokens or max(1, block - write.prompt_tokens)
    endpoint = Endpoint(url, model, most, write.temperature, write.top_p)
    records = ask_endpoint(endpoint, data, folder, write, tokenizer, tokens, seed, progress)
    console.print(f"{len(records)} answers of {model!r}, learnt as hard labels (alpha 1); they are kept in {folder}")
    return answer_blocks(records, tokenizer, block, tokens, seed)


def across(
    say: str, mode: str, teacher: Any, tokenizer: Any, data: str, train: Blocks, out: Path, settings: TrainConfig,
    write: WriteConfig, seed: int, console: Any, progress: Any,
) -> tuple[dict[str, Any], TrainConfig]:  # fmt: skip
    """(what `distill` reads, its settings) for a teacher with another tokenizer, said so: its text, or its distributions matched up.

    train: the blocks of the same data in the student's tokenizer, for their number.
    """
    block, tokens = train.input_ids.shape[1], train.tokens
    if mode == "text":
        console.print(
            f"{say}; so it writes text and the student learns that as hard labels (alpha 1). --cross-tokenizer uld or aligned "
            "would use its distributions",
            highlight=False,
        )
        own = min(block, getattr(teacher.config.get_text_config(), "max_position_embeddings", block))
        write_text(teacher, out / "written", data, write, tokens, block=own, seed=seed, progress=progress)
        return {"data": load_blocks(out / "written", tokenizer, block, "train", tokens, seed)}, hard_labels(settings)
    console.print(f"{say}; its distributions are matched by {mode}", highlight=False)
    blocks, targets = cross_targets(teacher, tokenizer, data, block, tokens, mode, seed)
    return {"data": blocks, "targets": targets}, settings
