"""A tokenizer's chat template, with what it expects: content as text or parts, arguments as objects or text, and the date."""

import re
from collections.abc import Callable
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.data.chat.conversation import Conversation, arguments_as_text, as_parts, joined_parts
from moe2dense.data.counts import Unusable
from moe2dense.data.options import DEFAULTS, TextOptions
from moe2dense.errors import UserError, first_line

_WORD = "quetzalcoatlus"  # no template writes it, so that it can be looked for
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUOTED = re.compile(r"""(['"])((?:(?!\1).)*%(?:(?!\1).)*)\1""")


class ChatTemplate:
    """Renders conversations as the tokenizer's template, or that of a file, does. Raises UserError where there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TextOptions = DEFAULTS):
        self.tokenizer, self._own, self._date = tokenizer, options.template_text(), options.date
        if not self._own and not tokenizer.chat_template:
            raise UserError(
                "data has `messages` but the tokenizer has no chat template; pass one with --chat-template FILE, or use `text` records instead"
            )
        self._texts: dict[bool, str] = {}

    def _text(self, tools: bool) -> str:
        """Return the template's text: some tokenizers have another one for conversations with tools."""
        if tools not in self._texts:
            try:
                text = self.tokenizer.get_chat_template(self._own or None, [{}] if tools else None)
            except ValueError as error:
                raise UserError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
            self._texts[tools] = with_date(text, self._date)
        return self._texts[tools]

    def marks_answers(self, chat: Conversation) -> bool:
        """Return whether the template itself says which words are the assistant's, by `{% generation %}`."""
        return bool(_MARKS.search(self._text(bool(chat.tools))))

    def adapted(self, chat: Conversation) -> Conversation:
        """Return the conversation with content and arguments in the form that the template expects."""
        if any(isinstance(m.get("content"), list) for m in chat.messages) and not self._takes_parts:
            chat = chat.map(joined_parts)
        elif not self._takes_strings:
            chat = chat.map(as_parts)
        if any("tool_calls" in m for m in chat.messages) and not self._takes_objects:
            chat = chat.map(arguments_as_text)
        return chat

    def render(self, chat: Conversation, turns: int | None = None, answer: bool = False) -> str:
        """Return the first turns, or all, as text; with `answer`, up to where the assistant's next turn begins.

        Raises Unusable where the template refuses the conversation.
        """
        return self._apply(chat, turns, tokenize=False, add_generation_prompt=answer)

    def marked(self, chat: Conversation, turns: int | None = None) -> tuple[list[int], list[bool]]:
        """Return (token ids, True where the template's own marks say that the assistant wrote). Raises Unusable."""
        out = self._apply(chat, turns, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids of a rendered text, and from which character to which each one reaches."""
        try:
            out: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise UserError(
                "the tokenizer cannot say where its tokens stand in the text, which marks the assistant's words; "
                "give the teacher a tokenizer.json (transformers' fast tokenizer)"
            ) from None
        return list(out["input_ids"]), list(out["offset_mapping"])

    def _apply(self, chat: Conversation, turns: int | None, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                chat.messages[:turns],
                tools=chat.tools,  # type: ignore[arg-type]
                documents=chat.documents,
                chat_template=self._text(bool(chat.tools)),
                **options,
                **chat.variables,
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program: it raises its own errors and Python's
            raise Unusable(f"the chat template refuses it ({first_line(error)})") from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether parts of content are rendered as their text, and not as Python writes a list."""
        return self._shows(
            [{"type": "text", "text": _WORD}], lambda text: "'text'" not in text and '"text"' not in text
        )

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether content that is a string is rendered: some templates look for parts alone. True where neither is."""
        return self._shows(_WORD, lambda text: True) or not self._takes_parts

    def _shows(self, content: Any, clean: Callable[[str], bool]) -> bool:
        """Return whether a user's turn of this content is rendered with the word in it."""
        try:
            text = self.render(Conversation([{"role": "user", "content": content}]), answer=True)
        except Unusable:
            return False
        return _WORD in text and clean(text)

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether arguments given as an object are rendered as JSON, and not refused or written as Python's."""
        call = {"type": "function", "id": "call12345", "function": {"name": _WORD, "arguments": {_WORD: True}}}
        user, answer = {"role": "user", "content": _WORD}, {"role": "assistant", "tool_calls": [call]}
        tool: dict[str, Any] = {"type": "function", "function": {"name": _WORD, "description": "", "parameters": {}}}
        shapes = [Conversation([user, answer | extra], [tool]) for extra in ({}, {"content": ""})]
        for chat in shapes:
            try:
                return f"'{_WORD}': True" not in self.render(chat)
            except Unusable:
                continue
        # The template refuses objects: text, where it takes that.
        for chat in shapes:
            try:
                self.render(chat.map(arguments_as_text))
            except Unusable:
                continue
            return False
        return True


def with_date(template: str, day: str) -> str:
    """Return a template in which `strftime_now` gives `day` (as 2026-11-28), whatever day it is. "" leaves it as it is."""
    if not day or "strftime_now" not in template:
        return template
    try:
        at = date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"data.date must be a day such as 2026-11-28; found {day!r}") from error
    formats = {text for _, text in _QUOTED.findall(template)} | {"%Y-%m-%d"}
    days = ", ".join(f"{_quoted(f)}: {_quoted(at.strftime(f))}" for f in sorted(formats))
    # The line break after a block is dropped (trim_blocks), so that the template itself begins on a line of its own.
    return (
        "{%- macro strftime_now(format) -%}{%- set days = {" + days + "} -%}"
        "{{ days[format] if format in days else days['%Y-%m-%d'] }}{%- endmacro %}\n" + template
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
