"""Check chats: what is rendered against transformers, and what is learnt against a reference written by hand, for twelve families.

For every family 40 synthetic conversations (several turns, thinking, tools, parts of content, system turns). None may be refused that
transformers renders, and every answer must be taught exactly once, as the model would write it after the prompt it would see.

    python benchmarks/chats.py [--conversations 40]
"""

import argparse
import random
from dataclasses import dataclass
from datetime import date, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

from chat_templates import FAMILIES, Family, Segments, Turns
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe2dense.data.chat.conversation import conversation_of
from moe2dense.data.chat.samples import ChatSample, chat_samples
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable
from moe2dense.data.options import TextOptions

EXAMPLE = Path(__file__).parents[1] / "examples/tiny-mixtral"
DAY = date(2026, 3, 9)


class Today(datetime):
    """A clock that stands still, for templates with a date."""

    @classmethod
    def now(cls, tz: Any = None) -> "Today":
        """Return the day of this check."""
        return cls(DAY.year, DAY.month, DAY.day, tzinfo=tz)


WORDS = [
    "sea",
    "hill",
    "moon",
    "bread",
    "river",
    "stone",
    "naïve",
    "12.5",
    "ﬁsh",
    "漢字",
    "light",
    "{x}",
    "<b>",
    '"quoted"',
    "it's",
    "'single'",
    "🙂",
]


@dataclass
class Row:
    """What became of one family's conversations."""

    conversations: int = 0
    refused: int = 0
    answers: int = 0
    samples: int = 0
    rendered_differs: int = 0
    learnt_differs: int = 0


def words(draw: random.Random, most: int = 9) -> str:
    """Return a few words, sometimes in two lines."""
    chosen = draw.choices(WORDS, k=draw.randint(1, most))
    return draw.choice([" ", " ", "\n"]).join(chosen)


def conversation(draw: random.Random, features: frozenset[str]) -> dict[str, Any]:
    """Return a random conversation with some of the features: {"messages"} and perhaps {"tools"}."""
    turns: Turns = []
    if "system" in features and draw.random() < 0.5:
        turns.append({"role": "system", "content": words(draw)})
    tools = "tools" in features and draw.random() < 0.5
    for _ in range(draw.randint(1, 4)):
        turns.append({"role": "user", "content": words(draw)})
        if tools and draw.random() < 0.6:
            arguments = {draw.choice(WORDS): draw.choice([words(draw, 2), 3, 0.5, True, [1, "a"], {"b": 1}])}
            call = {"type": "function", "id": "call12345", "function": {"name": "look_up", "arguments": arguments}}
            turns.append(
                thinking({"role": "assistant", "content": "", "tool_calls": [call]}, draw, features - {"tags"})
            )
            turns.append({"role": "tool", "content": words(draw)})
        turns.append(thinking({"role": "assistant", "content": words(draw)}, draw, features))
    if "parts" in features and draw.random() < 0.3:
        for turn in turns:
            if turn["role"] != "tool" and turn["content"] and draw.random() < 0.6:
                cut = draw.randint(0, len(turn["content"]))
                parts = (turn["content"][:cut], turn["content"][cut:])
                turn["content"] = [{"type": "text", "text": part} for part in parts]
    if draw.random() < 0.2:
        turns.append({"role": "user", "content": words(draw)})  # nobody answered
    schema = {"name": "look_up", "description": words(draw), "parameters": {"type": "object", "properties": {}}}
    return {"messages": turns} | ({"tools": [{"type": "function", "function": schema}]} if tools else {})


def thinking(turn: dict[str, Any], draw: random.Random, features: frozenset[str]) -> dict[str, Any]:
    """Return a turn, sometimes with thinking beside its content, or before it in tags."""
    if "thinking" in features and draw.random() < 0.5:
        return turn | {"reasoning_content": words(draw)}
    if "tags" in features and draw.random() < 0.3:
        return turn | {"content": f"<think>\n{words(draw)}\n</think>\n\n{turn['content']}"}
    return turn


def tokenizer_for(family: Family) -> PreTrainedTokenizerBase:
    """Return the example's tokenizer with a family's template and tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.chat_template = family.template
    return tokenizer


def spans(segments: Segments) -> list[tuple[int, int]]:
    """Return the characters of each thing that the assistant writes."""
    ends = list(accumulate(len(text) for text, _ in segments))
    return [(end - len(text), end) for end, (text, learnt) in zip(ends, segments, strict=True) if learnt]


def taught(sample: ChatSample, family: Family, chat: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return which turns a sample teaches; raises AssertionError where its text or its marks are none of the reference's."""
    turns, tools = chat["messages"], chat.get("tools")
    for length in range(len(turns), 0, -1):
        segments = family.reference(turns[:length], tools, DAY)
        text = "".join(part for part, _ in segments)
        out: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if out["input_ids"] == sample.ids:
            break
    else:
        raise AssertionError("the sample is no rendering of the conversation")
    left, result = [i for i, learnt in enumerate(sample.learnt) if learnt], set()
    for turn in [i for i, t in enumerate(turns[:length]) if t["role"] == "assistant"]:
        own = family.reference(turns[: turn + 1], tools, DAY)
        start, end = spans(own)[-1]
        tokens = [i for i, (a, b) in enumerate(out["offset_mapping"]) if a < end and b > start]
        if set(tokens) <= set(left) and text.startswith("".join(part for part, _ in own)):
            left = [i for i in left if i not in tokens]
            result.add(turn)
    assert not left, "the sample teaches words that no answer is made of"
    return result


def check(family: Family, count: int, seed: int = 0) -> Row:
    """Return what became of a family's conversations."""
    draw, tokenizer, row = random.Random(seed), tokenizer_for(family), Row()
    template = ChatTemplate(tokenizer, TextOptions(date=DAY.isoformat()))
    for _ in range(count):
        chat = conversation(draw, family.features)
        row.conversations += 1
        answers = {i for i, turn in enumerate(chat["messages"]) if turn["role"] == "assistant"}
        row.answers += len(answers)
        parsed = template.adapted(conversation_of(chat))
        expected = "".join(part for part, _ in family.reference(chat["messages"], chat.get("tools"), DAY))
        try:
            rendered = template.render(parsed)
            samples = chat_samples(conversation_of(chat), template)
        except Unusable as reason:
            print(f"refused: {reason}")
            row.refused += 1
            continue
        row.samples += len(samples)
        with patch("transformers.utils.chat_template_utils.datetime", Today):
            own = tokenizer.apply_chat_template(parsed.messages, tools=parsed.tools, tokenize=False)
        row.rendered_differs += not own == rendered == expected
        try:
            seen = [turn for sample in samples for turn in taught(sample, family, chat, tokenizer)]
            row.learnt_differs += sorted(seen) != sorted(answers)
        except AssertionError:
            row.learnt_differs += 1
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=40)
    args = parser.parse_args()
    columns = ("conversations", "refused", "answers", "samples", "rendered_differs", "learnt_differs")
    print(f"{'family':12}" + "".join(f"{name.replace('_', ' '):>18}" for name in columns))
    for name, family in FAMILIES.items():
        row = check(family, args.conversations)
        print(f"{name:12}" + "".join(f"{getattr(row, column):>18}" for column in columns))


if __name__ == "__main__":
    main()
