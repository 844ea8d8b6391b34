"""One conversation as templates take it: turns of roles, text and calls, with the tools and documents that belong to it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe2dense.data.counts import Unusable

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a turn's thinking is given
_TEXT_PARTS = ("text", "input_text", "output_text")
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Conversation:
    """Turns and what the template is given beside them. The assistant's turns from `learn_from` on are to be learnt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    learn_from: int = 0

    def answers(self) -> list[int]:
        """Return the numbers of the turns to learn."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i >= self.learn_from]

    def with_turn(self, number: int, message: dict[str, Any]) -> "Conversation":
        """Return the conversation with one turn exchanged."""
        return replace(self, messages=[*self.messages[:number], message, *self.messages[number + 1 :]])

    def map(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> "Conversation":
        """Return the conversation with every turn changed."""
        return replace(self, messages=[change(m) for m in self.messages])


def conversation_of(passage: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a passage with `messages`. Raises Unusable for a turn that cannot be rendered."""
    return Conversation(
        [_message(m, number) for number, m in enumerate(passage["messages"], 1)],
        passage.get("tools"),
        passage.get("documents"),
        dict(passage.get("chat_template_kwargs") or {}),
        int(passage.get("learn_from", 0)),
    )


def _message(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a turn without nulls, its parts checked and its calls' arguments as objects. Raises Unusable."""
    message = {k: v for k, v in turn.items() if v is not None}
    content, calls = message.get("content"), _calls(message.get("tool_calls"))
    if calls:
        message["tool_calls"] = calls
    else:
        message.pop("tool_calls", None)
        if content is None and not any(message.get(name) for name in REASONING):
            raise Unusable(f"message {number} has neither `content` nor `tool_calls`")
    if isinstance(content, list):
        message |= _parts(content, number)
    elif content is not None and not isinstance(content, str):
        raise Unusable(f"the content of message {number} is {type(content).__name__}, neither text nor parts")
    return message


def _parts(parts: list[Any], number: int) -> dict[str, Any]:
    """Return `content` as parts of text, and thinking that was among them as `reasoning_content`. Raises Unusable."""
    texts, thinking = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, str):
            texts.append({"type": "text", "text": part})
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append({"type": "text", "text": part["text"]})
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            thinking.append(part["thinking"])
        else:
            raise Unusable(f"message {number} has a part of type {kind!r}, and only text is read")
    return {"content": texts} | ({"reasoning_content": "".join(thinking)} if thinking else {})


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects, as templates take them, and not JSON text, as servers send them."""
    if isinstance(calls, str):
        calls = _json_object(calls)
    return [_call(c) for c in calls if isinstance(c, dict)] if isinstance(calls, list) else []


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {k: v for k, v in call.items() if v is not None} | {"function": _call(call["function"])}
    if isinstance(call.get("arguments"), str):
        return call | {"arguments": _json_object(call["arguments"])}
    return call


def _json_object(text: str) -> Any:
    """Return what JSON text holds where it is an object or a list; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (dict, list)) else text


def joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose content is a string."""
    content = message.get("content")
    return message | {"content": "".join(p["text"] for p in content)} if isinstance(content, list) else message


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose content is a list of parts."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as JSON text."""
    return (
        message | {"tool_calls": [_text_call(c) for c in message["tool_calls"]]} if "tool_calls" in message else message
    )


def _text_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _text_call(call["function"])}
    value = call.get("arguments")
    return call | {"arguments": json.dumps(value, ensure_ascii=False)} if isinstance(value, (dict, list)) else call


def with_other_answer(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return a turn whose first visible character after any thinking is another one; None where it has no words."""
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            changed = _other_start(part["text"])
            if changed is not None:
                return message | {"content": [*content[:i], part | {"text": changed}, *content[i + 1 :]]}
        return None
    changed = _other_start(content) if isinstance(content, str) else None
    return None if changed is None else message | {"content": changed}


def _other_start(text: str) -> str | None:
    """Return text with its first visible character after any thinking exchanged; None where there is none."""
    begin = text.rfind(END_OF_THINKING)
    begin = begin + len(END_OF_THINKING) if begin >= 0 else 0
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    return text[:begin] + _other(text[begin]) + text[begin + 1 :] if begin < len(text) else None


def with_other_thinking(message: dict[str, Any], first: bool = False) -> dict[str, Any] | None:
    """Return a turn whose thinking ends, or with `first` begins, with another visible character; None where it has none apart."""
    thinking = next((message[k] for k in REASONING if isinstance(message.get(k), str) and message[k].strip()), None)
    if thinking is None:
        return None
    at = len(thinking) - len(thinking.lstrip()) if first else len(thinking.rstrip()) - 1
    changed = thinking[:at] + _other(thinking[at]) + thinking[at + 1 :]
    return message | {k: changed for k in REASONING if message.get(k) == thinking}


def with_other_call(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return a turn whose first call is of another name; None where it calls nothing."""
    if "tool_calls" not in message:
        return None
    call, *others = message["tool_calls"]
    function = call.get("function", call)
    name = str(function.get("name", ""))
    function = function | {"name": _other(name[:1]) + name[1:]}
    return message | {"tool_calls": [call | {"function": function} if "function" in call else function, *others]}


def _other(character: str) -> str:
    return "y" if character == "x" else "x"
