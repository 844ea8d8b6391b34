"""Turn conversations and completions into tokens, and mark which of those tokens are the answer."""

from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moe2dense.errors import UserError


def chat_tokens(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return token ids of a conversation in the tokenizer's chat template, and True where the assistant's words are.

    A template with `{% generation %}` marks says itself; otherwise a turn is what its rendering adds to that of the
    turns before it. Raises UserError when there is no template, a message is malformed, or turns cannot be told apart.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError("data has `messages` but the tokenizer has no chat template; use `text` records instead")
    if not messages or any(not isinstance(m, dict) or "role" not in m or "content" not in m for m in messages):
        raise UserError("data has a conversation without `role` and `content` in every message")
    if "generation %}" in str(template) or "generation -%}" in str(template):
        out: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
    text, spans = _assistant_spans(messages, tokenizer)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in out["offset_mapping"]]
    return list(out["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]


def completion_tokens(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return token ids of prompt + completion, and True where the completion's are."""
    out: Any = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    return list(out["input_ids"]), [end > len(prompt) for _, end in out["offset_mapping"]]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answer: bool = False) -> str:
    """Return messages as text, in the tokenizer's chat template; with `answer`, up to where the assistant's turn begins."""
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


def _assistant_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and the character ranges of the assistant's turns."""
    text = _rendered(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:i], answer=True)
        after = _rendered(tokenizer, messages[: i + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; "
                "give the tokenizer a template with {% generation %} marks"
            )
        spans.append((len(before), len(after)))
    return text, spans
