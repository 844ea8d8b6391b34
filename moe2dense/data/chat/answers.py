"""Find where an assistant's turn begins and ends in a rendering, by comparing renderings of the conversation.

A template may force words on the assistant, drop earlier thinking or write another end for the last turn, so that only
renderings in which the turn is the last one are compared.
"""

import re

from moe2dense.data.chat.conversation import (
    END_OF_THINKING,
    Conversation,
    with_other_answer,
    with_other_call,
    with_other_thinking,
)
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable

_CLOSING = re.compile(rf"\s*{re.escape(END_OF_THINKING)}\s*")


class Answers:
    """The renderings of one conversation, each made once."""

    def __init__(self, template: ChatTemplate, chat: Conversation):
        self.template, self.chat = template, chat
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, turns: int, answer: bool = False) -> str:
        """Return the first turns rendered, with `answer` up to where the assistant's next turn begins. Raises Unusable."""
        if (turns, answer) not in self._texts:
            self._texts[turns, answer] = self.template.render(self.chat, turns, answer)
        return self._texts[turns, answer]

    def span(self, turn: int, reasoning: bool = True) -> tuple[int, int]:
        """Return from which character to which of `text(turn + 1)` the assistant writes in this turn.

        reasoning: whether its thinking counts. Raises Unusable where the turn cannot be told from what stands before it.
        """
        text = self.text(turn + 1)
        start = self._start(turn)
        if not reasoning:
            start = max(start, self._after_thinking(turn, start))
        return start, len(text)

    def calls(self, turn: int) -> tuple[int, int] | None:
        """Return from which character to which of `text(turn + 1)` the turn calls tools, its end included; None where it calls nothing.

        Raises Unusable as `span` does.
        """
        message, text = self.chat.messages[turn], self.text(turn + 1)
        other = with_other_call(message)
        if other is None:
            return None
        name = common_prefix(text, self._rendered_with(turn, other))
        silent = {k: v for k, v in message.items() if k != "tool_calls"} | {"content": message.get("content") or ""}
        try:
            begin = min(name, common_prefix(text, self._rendered_with(turn, silent)))
        except Unusable:  # a template may refuse a turn that says nothing
            begin = name
        # without calls a template may write the thinking elsewhere: what precedes the call's own words is none of it
        before = self._after_thinking(turn, 0)
        words = message.get("content")
        if isinstance(words, str) and words.strip():
            at = text.find(words.strip(), max(0, before - 1))
            before = at + len(words.strip()) if 0 <= at < name else before
        return max(begin, min(before, name)), len(text)

    def _start(self, turn: int) -> int:
        """Return where the turn's words begin: what the template writes before any answer is not the assistant's."""
        after = self.text(turn + 1)
        try:
            before = self.text(turn, answer=True) if turn else None
        except Unusable:  # a template may refuse to stop there
            before = None
        if before is None:
            return self._first_change(turn)
        if after.startswith(before):
            return len(before)
        # What is forced on the next answer is not in this one, such as `<think>` before an answer without thinking.
        plain = self.text(turn)
        if after.startswith(plain):
            return max(len(plain), self._common_tokens(before, after))
        # Earlier turns read otherwise once this answer follows them: the header before it is looked for.
        header = before[len(plain) :] if before.startswith(plain) else ""
        change = self._first_change(turn)
        begin = after.rfind(header, 0, change) if header else -1
        return begin + len(header) if begin >= 0 else change

    def _common_tokens(self, one: str, other: str) -> int:
        """Return at which character of `other` its first token begins that `one` does not share."""
        ids, _ = self.template.tokens(one)
        others, places = self.template.tokens(other)
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
        )
        return places[same][0] if same < len(places) else len(other)

    def _first_change(self, turn: int) -> int:
        """Return where the rendering changes with the first character of the turn's thinking or content. Raises Unusable."""
        message = self.chat.messages[turn]
        variants = (with_other_answer(message), with_other_thinking(message, first=True), with_other_call(message))
        changes = [common_prefix(self.text(turn + 1), self._rendered_with(turn, v)) for v in variants if v is not None]
        if not changes:
            raise Unusable(f"the chat template does not show where message {turn + 1} begins")
        return min(changes)

    def _after_thinking(self, turn: int, start: int) -> int:
        """Return where the turn goes on after its thinking; `start` where there is none."""
        message, text = self.chat.messages[turn], self.text(turn + 1)
        changed = with_other_answer(message)
        if changed is not None:
            return common_prefix(text, self._rendered_with(turn, changed))
        changed = with_other_thinking(message)
        other = text if changed is None else self._rendered_with(turn, changed)
        if other == text:
            return start
        end = len(text) - common_prefix(text[::-1], other[::-1])
        closing = _CLOSING.match(text, end)
        return closing.end() if closing else end

    def _rendered_with(self, turn: int, message: dict) -> str:
        return self.template.render(self.chat.with_turn(turn, message), turn + 1)


def common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
