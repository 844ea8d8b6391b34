"""Black-box distillation: of the teacher only answers are known, and the student learns them as hard labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moe2dense.config.schema import WriteConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.chat.conversation import joined_parts
from moe2dense.data.load import blocks_of
from moe2dense.data.options import DEFAULTS, TextOptions
from moe2dense.errors import UserError
from moe2dense.generation.endpoint import Endpoint, collect
from moe2dense.generation.prompts import read_prompts


def read_completions(path: str | Path) -> tuple[list[dict[str, Any]], str]:
    """Return (records of a .jsonl file, a warning or "").

    A record is {"prompt", "completion"}, {"messages"} that end with an answer, or {"text"}. A last line that was cut short is
    left out, and the warning says so. Raises UserError naming the line for anything else.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--completions {path} cannot be read: {error.strerror}") from error
    records, warning = [], ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it: whoever wrote the file stopped here
                warning = f"--completions {path}: line {number} is cut short and left out"
                continue
            raise UserError(
                f"--completions {path}: line {number} is not JSON ({line[:40]!r}); repair or remove it"
            ) from None
        records.append(_checked(record, f"--completions {path}: line {number}"))
    if not records:
        raise UserError(f"--completions {path} holds no completion; each line needs prompt and completion, or messages")
    return records, warning


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Return a parsed line that is a record. Raises UserError for another."""
    if isinstance(record, dict):
        if isinstance(record.get("completion"), str) or isinstance(record.get("text"), str):
            return record
        messages = record.get("messages")
        if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
            return record
    raise UserError(f"{where} has neither prompt and completion, nor messages that end with the assistant's, nor text")


def ask_endpoint(
    endpoint: Endpoint,
    data: str,
    folder: Path,
    write: WriteConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int | None,
    seed: int,
    progress: Callable[..., None] | None = None,
    options: TextOptions = DEFAULTS,
) -> list[dict[str, Any]]:
    """Return the endpoint's answers to the prompts in `data`, about `tokens` student tokens. See `collect`."""
    stride = write.prompt_tokens + endpoint.max_tokens
    prompts = read_prompts(data, tokenizer, "train", seed, write.prompt_tokens, stride, options)
    sizes: list[int] = []

    def enough(records: list[dict[str, Any]]) -> bool:
        for record in records[len(sizes) :]:
            messages = record.get("messages")
            spoken = [joined_parts(m).get("content") or "" for m in messages or ()]
            text = " ".join(spoken) if messages else record["prompt"] + record["completion"]
            sizes.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)
        return tokens is not None and sum(sizes) >= tokens

    return collect(endpoint, prompts, folder, data, enough, progress)


def answer_blocks(
    records: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    tokens: int | None,
    seed: int,
    options: TextOptions = DEFAULTS,
) -> tuple[Blocks, Blocks | None]:
    """Return (training blocks, held-out blocks: a twentieth of the records, None when they fill no block).

    options: how documents are made of the records.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [records[i] for i in order]
    training = len(shuffled) - len(shuffled) // 20
    train = blocks_of(shuffled[:training], tokenizer, block, "of the completions", tokens, options)
    try:
        held_out = blocks_of(shuffled[training:], tokenizer, block, "held out", options=options)
    except UserError:
        held_out = None
    return train, held_out
