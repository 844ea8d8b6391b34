"""Say what of a record is text to learn: one passage from whichever of the known fields the record has.

A passage is a dict with one of these, and perhaps `domain` and `source`:
text        {"text"}
completion  {"prompt", "completion"}, of which the completion is learnt; {"prompt"} alone is a prompt to continue
chat        {"messages", and where given "tools", "documents", "chat_template_kwargs", "learn_from"}, with `role` in every message
"""

import json
from collections.abc import Mapping
from typing import Any

from moe2dense.data.counts import Unusable

_LABELS = ("domain", "source")
# what belongs to a conversation, and the keys that tell it from other text
_CHAT_FIELDS = {
    "tools": frozenset({"type", "function", "name"}),
    "documents": frozenset({"text", "title", "doc_id"}),
    "chat_template_kwargs": frozenset({"enable_thinking", "thinking", "reasoning_effort"}),
}
_TEXT_FIELDS = ("text", "messages", "conversations", "prompt", "completion", "response", "chosen")
# every field that is read; others are left alone, whatever they hold
FIELDS = frozenset({*_TEXT_FIELDS, *_LABELS, *_CHAT_FIELDS, "system"})
_MESSAGE = frozenset({"role", "from"})
_CALL = frozenset({"name", "function"})
# ShareGPT's names of the speakers
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


def passage_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the passage that a record holds. Raises Unusable with the reason where it holds none."""
    passage = _content(record)
    if "messages" in passage:
        for name, keys in _CHAT_FIELDS.items():
            value = _decoded(record.get(name), keys)
            if isinstance(value, (list, dict)) and value:
                passage[name] = value
    passage |= {name: str(record[name]) for name in _LABELS if record.get(name)}
    try:
        (passage["text"] if passage.keys() == {"text"} else _all_text(passage)).encode()
    except UnicodeEncodeError as error:  # such as "\\ud83d" in JSON without its other half
        half = error.object[error.start : error.end]
        raise Unusable(f"it holds half a character ({half!r}), which is no text") from None
    return passage


def _all_text(passage: Mapping[str, Any]) -> str:
    """Return all text of a passage as one string."""
    return json.dumps(passage, ensure_ascii=False, default=str)


def split_key(record: Mapping[str, Any]) -> str | None:
    """Return what decides the split of a record of a single file: its text, prompt or conversation; None where it has none."""
    content = next((record[k] for k in ("text", "prompt") if record.get(k) is not None), None)
    if content is not None:
        return str(content)
    content = next((record[k] for k in ("messages", "conversations", "chosen") if record.get(k) is not None), None)
    return None if content is None else repr(content)


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a passage that is learnt."""
    if record.get("messages"):
        return {"messages": _conversation(record["messages"], "messages")}
    if record.get("conversations"):
        return _sharegpt(record)
    if record.get("chosen"):
        return _preferred(record)
    answer = next((name for name in ("completion", "response") if record.get(name) is not None), None)
    if answer is not None:
        return _completion(record.get("prompt"), record[answer], answer)
    if record.get("text") is not None:
        if not isinstance(record["text"], str):
            raise Unusable(f"`text` must be a string; found {type(record['text']).__name__}")
        if not record["text"].strip():
            raise Unusable("`text` is empty")
        return {"text": record["text"]}
    return _prompt(record)


def _prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt without an answer. Raises Unusable where the record has not even that."""
    null = next((name for name in ("completion", "response") if name in record), None)
    if null is not None:
        raise Unusable(f"`{null}` is null")
    prompt = _decoded(record.get("prompt"))
    if isinstance(prompt, list) and prompt:
        return {"messages": _conversation(prompt, "prompt"), "learn_from": len(prompt)}
    if isinstance(prompt, str) and prompt.strip():
        return {"prompt": prompt}
    present = [name for name in _TEXT_FIELDS if name in record]
    if present:
        raise Unusable(f"`{present[0]}` is empty")
    raise Unusable(
        f"no `text` field (found {', '.join(record) or 'none'}); a record needs `text`, `messages` or `conversations` for chat, "
        "`prompt` and `completion`, or `chosen`"
    )


def _completion(prompt: Any, answer: Any, name: str) -> dict[str, Any]:
    """Return prompt and completion, strings or conversations. name: the field of the answer."""
    prompt, answer = _decoded(prompt), _decoded(answer)
    if isinstance(answer, str):
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": answer}]
        elif not answer:
            raise Unusable(f"`{name}` is empty")
        else:
            return {"prompt": str(prompt or ""), "completion": answer}
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, list) or not answer:
        raise Unusable(f"`{name}` must be a string or a list of messages; found {type(answer).__name__}")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt or []
    before = _conversation(before, "prompt") if before else []
    return {"messages": [*before, *_conversation(answer, name)], "learn_from": len(before)}


def _preferred(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preferred answer of a preference set, which may hold the whole conversation."""
    prompt, chosen = _decoded(record.get("prompt")), _decoded(record["chosen"])
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(chosen, str):
        return {"text": chosen} if prompt is None else _completion(prompt, chosen, "chosen")
    messages = _conversation(chosen, "chosen")
    if messages[0]["role"] != "assistant":  # the prompt's turns are its first
        return {"messages": messages}
    return _completion(prompt, messages, "chosen")


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a conversation of {"from", "value"}; `system` and a `chosen` answer beside it belong to it."""
    messages = _conversation(record["conversations"], "conversations")
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    chosen = _decoded(record.get("chosen"))
    if isinstance(chosen, dict) and messages[-1]["role"] != "assistant":
        return {"messages": [*messages, *_conversation([chosen], "chosen")], "learn_from": len(messages)}
    return {"messages": messages}


def _conversation(value: Any, name: str) -> list[dict[str, Any]]:
    """Return turns with a `role` each. Raises Unusable."""
    value = _decoded(value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"`{name}` must be a list of messages; found {type(value).__name__}")
    return [_turn(turn, number, name) for number, turn in enumerate(value, 1)]


def _turn(turn: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    """Return one turn with `role` and `content`, of either dialect."""
    if isinstance(turn.get("role"), str):
        return turn
    speaker = turn.get("from")
    if not isinstance(speaker, str) or "value" not in turn:
        raise Unusable(f"message {number} of `{name}` has no `role` (found {', '.join(turn) or 'nothing'})")
    if speaker not in _SPEAKERS:
        raise Unusable(f"message {number} of `{name}` is from {speaker!r}, which is no known speaker")
    call = _decoded(turn["value"], _CALL) if speaker == "function_call" else None
    if isinstance(call, dict) and "name" in call:
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": _SPEAKERS[speaker], "content": turn["value"]}


def _decoded(value: Any, keys: frozenset[str] = _MESSAGE) -> Any:
    """Return the objects that are given as JSON text, as table columns often are; a string without these keys is text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    objects = decoded if isinstance(decoded, list) else [decoded]
    return decoded if objects and all(isinstance(x, dict) and x.keys() & keys for x in objects) else value
