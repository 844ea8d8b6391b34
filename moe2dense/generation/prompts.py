"""Read prompts to continue: beginnings of passages, given prompts, or conversations up to the user's last turn."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.data.load import parse_mixture
from moe2dense.data.records import passages
from moe2dense.errors import UserError

_MIN_TOKENS = 4  # of a passage's beginning


@dataclass
class Prompt:
    """Token ids to continue, and their text; messages: the conversation that the text renders, if any."""

    ids: list[int]
    text: str
    domain: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)


def read_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, split: str, seed: int, prompt_tokens: int, stride: int
) -> Iterator[Prompt]:
    """Yield the prompts of one split in a seeded order, each once.

    A record with `prompt` gives that; `messages` gives the conversation up to its last user turn in the tokenizer's chat
    template; `text` gives the first `prompt_tokens` tokens of every `stride`. Raises UserError as `passages` does, and when
    nothing can be continued.
    """
    if prompt_tokens < 1:
        raise UserError(f"prompt_tokens must be at least 1; found {prompt_tokens}")
    count = 0
    for row in _mixed(path, split, seed):
        for prompt in _of_record(row, tokenizer, prompt_tokens, stride):
            count += 1
            yield prompt
    if not count:
        raise UserError(
            f"data {str(path)!r} ({split}) has no text to continue; give records with text, prompt or messages"
        )


def _mixed(path: str | Path, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield passages of one source, or of a mixture PATH=WEIGHT,... taken in proportion until one of them ends."""
    if "=" not in str(path) or Path(path).exists():
        yield from passages(path, split, seed)
        return
    weights = parse_mixture(str(path))
    sources = [passages(p, split, seed) for p in weights]
    taken = [0.0] * len(sources)
    while True:
        i = min(range(len(sources)), key=lambda k: (taken[k] + 1) / list(weights.values())[k])
        row = next(sources[i], None)
        if row is None:
            return
        taken[i] += 1
        yield row


def _of_record(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, stride: int
) -> Iterator[Prompt]:
    """Yield the prompts that one record gives."""
    domain = str(row.get("domain") or "")
    if row.get("messages"):
        yield _conversation(row["messages"], tokenizer, domain)
    elif isinstance(row.get("prompt"), str) and row["prompt"].strip():
        yield Prompt(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"], row["prompt"], domain)
    elif isinstance(row.get("text"), str) and row["text"].strip():
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), max(1, stride)):
            part = ids[start : start + prompt_tokens]
            if len(part) >= min(_MIN_TOKENS, prompt_tokens):
                yield Prompt(part, str(tokenizer.decode(part, skip_special_tokens=True)), domain)


def _conversation(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, domain: str) -> Prompt:
    """Render the turns up to the user's last, so that the assistant's turn comes next."""
    if not tokenizer.chat_template:
        raise UserError(
            "data has `messages` but the tokenizer has no chat template; use `text` or `prompt` records instead"
        )
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
    if last < 0:
        raise UserError("data has a conversation without a user's turn to answer")
    turns = messages[: last + 1]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return Prompt(tokenizer(text, add_special_tokens=False)["input_ids"], text, domain, turns)
