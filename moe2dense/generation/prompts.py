"""Read prompts to continue: beginnings of passages, given prompts, or conversations up to the user's last turn."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.data.chat.conversation import conversation_of
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable
from moe2dense.data.load import parse_mixture
from moe2dense.data.options import DEFAULTS, TextOptions, document_prefix
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
    beside: dict[str, Any] = field(default_factory=dict)


def read_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    seed: int,
    prompt_tokens: int,
    stride: int,
    options: TextOptions = DEFAULTS,
) -> Iterator[Prompt]:
    """Yield the prompts of one split in a seeded order, each once.

    A record with `prompt` gives that; `messages` gives the conversation up to its last user turn in the tokenizer's chat
    template; `text` gives the first `prompt_tokens` tokens of every `stride`. What the tokenizer puts before a prompt (BOS) stands
    there, as options.bos says. Records that cannot be used are left out. Raises UserError as `passages` does, and when nothing
    can be continued.
    """
    if prompt_tokens < 1:
        raise UserError(f"prompt_tokens must be at least 1; found {prompt_tokens}")
    count, reader = 0, _PromptReader(tokenizer, options, prompt_tokens, stride)
    for row in _mixed(path, split, seed):
        for prompt in reader.of(row):
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


class _PromptReader:
    """Makes prompts of passages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TextOptions, prompt_tokens: int, stride: int):
        self._tokenizer, self._options = tokenizer, options
        self._prompt_tokens, self._stride = prompt_tokens, max(1, stride)
        self._prefix = document_prefix(tokenizer, options.bos)
        self._template: ChatTemplate | None = None

    def of(self, row: dict[str, Any]) -> Iterator[Prompt]:
        """Yield the prompts that one passage gives; none where it cannot be continued."""
        domain = str(row.get("domain") or "")
        if "messages" in row:
            with contextlib.suppress(Unusable):
                yield self._conversation(row, domain)
        elif row.get("prompt", "").strip():
            yield Prompt([*self._prefix, *self._ids(row["prompt"])], row["prompt"], domain)
        elif "text" in row:
            ids = self._ids(row["text"])
            for start in range(0, len(ids), self._stride):
                part = ids[start : start + self._prompt_tokens]
                if len(part) >= min(_MIN_TOKENS, self._prompt_tokens):
                    text = str(self._tokenizer.decode(part, skip_special_tokens=True))
                    yield Prompt([*self._prefix, *part], text, domain)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def _conversation(self, row: dict[str, Any], domain: str) -> Prompt:
        """Render the turns up to the user's last, so that the assistant's turn comes next. Raises Unusable without one."""
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._options)
        messages = row["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if last < 0:
            raise Unusable("no user's turn to answer")
        turns = messages[: last + 1]
        text = self._template.render(self._template.adapted(conversation_of(row | {"messages": turns})), answer=True)
        template_values = {name: row[name] for name in ("tools", "documents", "chat_template_kwargs") if name in row}
        return Prompt(self._ids(text), text, domain, turns, template_values)
