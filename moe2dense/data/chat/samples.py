"""Turn conversations into token ids with the words to learn marked, as few samples as show every answer as the model would write it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe2dense.data.chat.answers import Answers
from moe2dense.data.chat.conversation import Conversation
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable

_LEADING = ("system", "developer")


@dataclass(frozen=True)
class ChatSample:
    """A rendered conversation: token ids, True where a token is to be learnt, and where it is so because the turn calls tools."""

    ids: list[int]
    learnt: list[bool]
    calls: list[bool]


def chat_samples(
    chat: Conversation, template: ChatTemplate, learn: str = "all", longest: int | None = None
) -> list[ChatSample]:
    """Return the samples of a conversation, in the order of the answers that they teach.

    learn: all of the assistant's turns, the last, or all without reasoning (no-reasoning). One sample teaches every answer where the
    template leaves earlier turns as they were written; where it drops earlier thinking, each answer is taught as the last turn of its
    own sample. longest: conversations of more tokens are cut between exchanges, the system turn repeated; one exchange is never cut.
    Raises Unusable where there is nothing to learn or the template refuses the conversation.
    """
    chat = template.adapted(chat)
    if not chat.answers():
        raise Unusable("the conversation has no assistant's turn to learn")
    samples = []
    for piece in _pieces(chat, template, longest):
        if learn == "last" and piece.answers():
            samples = []
        if piece.answers():
            samples += _samples_of(piece, template, learn)
    if not any(any(s.learnt) for s in samples):
        raise Unusable("the chat template renders nothing of the assistant's that could be learnt")
    return samples


def _samples_of(chat: Conversation, template: ChatTemplate, learn: str) -> list[ChatSample]:
    """Return the samples of a conversation that is short enough."""
    marked = template.marks_answers(chat)
    answers = Answers(template, chat)
    if marked and learn == "all" and not chat.learn_from:
        ids, learnt = template.marked(chat)
        length = len(chat.messages)
        called = [turn for turn in chat.answers() if "tool_calls" in chat.messages[turn]]
        turns = [turn for turn in called if answers.text(length).startswith(answers.text(turn + 1))]
        return [ChatSample(ids, learnt, _calls(answers, length, turns, learnt))]
    turns = chat.answers()[-1:] if learn == "last" else chat.answers()
    samples = []
    for length, taught in _renderings(answers, turns):
        text = answers.text(length)
        spans = [answers.span(turn, reasoning=learn != "no-reasoning") for turn in taught]
        ids, places = template.tokens(text)
        learnt = overlapping(places, spans)
        if marked:
            ids, marks = template.marked(chat, length)
            learnt = [a and b for a, b in zip(learnt, marks, strict=True)]
        samples.append(ChatSample(ids, learnt, _calls(answers, length, taught, learnt)))
    return samples[::-1]


def _calls(answers: Answers, length: int, turns: list[int], learnt: list[bool]) -> list[bool]:
    """Return which learnt tokens of the first `length` turns belong to tool calls of these turns."""
    spans = [span for turn in turns if "tool_calls" in answers.chat.messages[turn] and (span := answers.calls(turn))]
    if not spans:
        return [False] * len(learnt)
    _, places = answers.template.tokens(answers.text(length))
    return [a and b for a, b in zip(overlapping(places, spans), learnt, strict=True)]


def _renderings(answers: Answers, turns: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of turns rendered, the answers that it teaches), from the longest; every answer is taught once."""
    length, remaining = len(answers.chat.messages), turns
    while remaining:
        text = answers.text(length)
        taught = [turn for turn in remaining if text.startswith(answers.text(turn + 1))]
        if taught:
            yield length, taught
        remaining = [turn for turn in remaining if turn not in taught]
        length = remaining[-1] + 1 if remaining else 0


def overlapping(places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Return for each token, from character to character, whether it reaches into one of the spans."""
    return [any(start < b and end > a for a, b in spans) for start, end in places]


def _pieces(chat: Conversation, template: ChatTemplate, longest: int | None) -> list[Conversation]:
    """Cut a conversation between exchanges into pieces that fit; the last piece holds as many exchanges as it can."""

    def fits(piece: Conversation) -> bool:
        return longest is None or len(template.tokens(template.render(piece))[0]) <= longest

    if fits(chat):
        return [chat]
    leading = next((i for i, m in enumerate(chat.messages) if m["role"] not in _LEADING), len(chat.messages))
    starts = [i for i, m in enumerate(chat.messages) if m["role"] == "user" and i > leading]
    pieces, end = [], len(chat.messages)
    while end > leading:
        options = [s for s in (leading, *starts) if s < end]
        begin = next((s for s in options if fits(_piece(chat, leading, s, end))), options[-1])
        pieces.append(_piece(chat, leading, begin, end))
        end = begin
    return pieces[::-1]


def _piece(chat: Conversation, leading: int, begin: int, end: int) -> Conversation:
    """Return the turns from `begin` to `end` after the leading system turns."""
    messages = [*chat.messages[:leading], *chat.messages[begin:end]]
    return replace(chat, messages=messages, learn_from=leading + max(0, chat.learn_from - begin))
