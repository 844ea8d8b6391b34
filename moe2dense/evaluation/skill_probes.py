"""Small tasks with a few candidate answers each, made by script from a seed: nothing is downloaded, and nobody wrote an answer key.

A probe is a prompt and candidates; a model solves it where the right candidate is the likeliest.
"""

import bisect
import fnmatch
import heapq
import inspect
import random
import re
import string
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks

CANDIDATES = 4
_WORDS = (
    "river", "stone", "house", "garden", "letter", "window", "horse", "table", "winter", "music", "paper", "candle", "bridge",
    "forest", "silver", "market", "doctor", "summer", "village", "captain",
)  # fmt: skip
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_SHORTEST, _LONGEST = 16, 48  # tokens of the training text before a word that is asked for
_CODE_LINES = 4  # lines of code before the word that is asked for


@dataclass(frozen=True)
class Skill:
    """A kind of task: its name, its title, and in a sentence what is asked."""

    name: str
    title: str
    help: str


SKILLS: tuple[Skill, ...] = (
    Skill("arithmetic", "Arithmetic", "The sum of two numbers below 50, after three sums that are worked out."),
    Skill("copying", "Copying", "The next word of a list of eight words that is written a second time."),
    Skill("induction", "Induction", "The word that stood beside another one in a list of pairs."),
    Skill("brackets", "Brackets", "The bracket that closes the innermost open one."),
    Skill(
        "facts", "Training text", "A rare word of a passage of the training text, after what stands before it there."
    ),
    Skill("code", "Code", "A name in a function of Python's standard library, after the lines before it."),
)


@dataclass(frozen=True)
class TextProbe:
    """A prompt and its candidates as text; the first is right."""

    skill: str
    prompt: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A task as token ids: each candidate's text with the prompt before it, from `start` on its own; the first is right."""

    skill: str
    candidates: tuple[tuple[int, ...], ...]
    start: int


def text_probes(count: int, seed: int = 0) -> list[TextProbe]:
    """Return `count` tasks of every skill but facts; the same seed gives the same ones."""
    makers: dict[str, Callable[[random.Random], tuple[str, list[str]]]] = {
        "arithmetic": _arithmetic,
        "copying": _copying,
        "induction": _induction,
        "brackets": _brackets,
    }
    probes = []
    for skill, make in makers.items():
        generator = random.Random(f"{skill} {seed}")
        for _ in range(count):
            prompt, candidates = make(generator)
            probes.append(TextProbe(skill, prompt, tuple(candidates)))
    code = list(_code_places())
    random.Random(f"code {seed}").shuffle(code)
    return probes + code[:count]


def _arithmetic(generator: random.Random) -> tuple[str, list[str]]:
    sums = [(generator.randint(11, 49), generator.randint(11, 49)) for _ in range(4)]
    worked = "".join(f"{a} + {b} = {a + b}\n" for a, b in sums[:-1])
    a, b = sums[-1]
    near = [a + b + d for d in (-10, -2, -1, 1, 2, 10) if 10 <= a + b + d <= 99]
    return f"{worked}{a} + {b} =", [f" {n}" for n in (a + b, *generator.sample(near, CANDIDATES - 1))]


def _copying(generator: random.Random) -> tuple[str, list[str]]:
    words = generator.sample(_WORDS, 8)
    at = generator.randint(3, 7)
    others = generator.sample([w for i, w in enumerate(words) if i not in (at, at - 1)], CANDIDATES - 1)
    prompt = f"The words are: {', '.join(words)}. Once more, the words are: {', '.join(words[:at])},"
    return prompt, [f" {w}" for w in (words[at], *others)]


def _induction(generator: random.Random) -> tuple[str, list[str]]:
    words = generator.sample(_WORDS, 10)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    asked = generator.randrange(len(pairs) - 1)
    others = generator.sample([b for i, (_, b) in enumerate(pairs) if i != asked], CANDIDATES - 1)
    prompt = "".join(f"{a} {b}. " for a, b in pairs) + pairs[asked][0]
    return prompt, [f" {w}" for w in (pairs[asked][1], *others)]


def _brackets(generator: random.Random) -> tuple[str, list[str]]:
    text: list[str] = []
    open_brackets: list[str] = []
    for _ in range(generator.randint(6, 12)):
        if open_brackets and generator.random() < 0.45:
            text.append(_BRACKETS[open_brackets.pop()])
        else:
            open_brackets.append(generator.choice(list(_BRACKETS)))
            text.append(open_brackets[-1])
    if not open_brackets:
        open_brackets.append(generator.choice(list(_BRACKETS)))
        text.append(open_brackets[-1])
    right = _BRACKETS[open_brackets[-1]]
    return " ".join(text), [f" {b}" for b in (right, *(b for b in _BRACKETS.values() if b != right))]


def _code_places() -> Iterator[TextProbe]:
    """Yield places in the code of some functions: a name that comes next, against other names of the lines before it."""
    functions = (
        bisect.insort_right, bisect.bisect_right, bisect.bisect_left, fnmatch.filter, fnmatch.translate, heapq.merge,
        heapq.nlargest, heapq.nsmallest, string.capwords, textwrap.dedent, textwrap.indent, textwrap.shorten,
        inspect.cleandoc, inspect.getmro, inspect.unwrap, inspect.indentsize,
    )  # fmt: skip
    for function in functions:
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # no source, or a function that is compiled
            continue
        lines = [line for line in source.split('"""')[-1].splitlines() if line.strip() and "#" not in line]
        for i in range(2, len(lines)):
            before = "\n".join(lines[max(0, i - _CODE_LINES) : i])
            match = re.match(r"(\s*\S.*?[ (])([A-Za-z_]{2,})\b", lines[i])
            generator = random.Random(f"{function.__name__} {i}")
            if match and (others := sorted(set(re.findall(r"[A-Za-z_]{2,}", before)) - {match[2]}))[CANDIDATES - 2 :]:
                prompt = f"{before}\n{match[1]}"
                # a space belongs to the word after it, as tokenizers have it
                space = " " if prompt.endswith(" ") else ""
                candidates = (match[2], *generator.sample(others, CANDIDATES - 1))
                yield TextProbe("code", prompt.removesuffix(" "), tuple(space + c for c in candidates))


def tokenised(probes: list[TextProbe], tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Return the tasks as token ids; those whose candidates a tokenizer cannot tell apart are left out."""
    result = []
    for probe in probes:
        texts = [probe.prompt, *(probe.prompt + c for c in probe.candidates)]
        prompt, *ids = (tuple(row) for row in tokenizer(texts)["input_ids"])
        start = _common(prompt, *ids)
        if start and len(set(ids)) == len(ids) and all(len(row) > start for row in ids):
            result.append(Probe(probe.skill, tuple(ids), start))
    return result


def _common(*rows: tuple[int, ...]) -> int:
    """Return how many ids all rows have in common at their beginning."""
    different = (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return next(different, min(len(row) for row in rows))


def fact_probes(
    blocks: Blocks, counts: Tensor, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0
) -> list[Probe]:
    """Return tasks of the training text: the rarest name or word of a passage, against such words of other passages.

    counts [V]: how often each token id occurs in that text. A word that its prompt already has is not asked for.
    """
    places: list[tuple[tuple[int, ...], int]] = []
    owners: set[int] = set()
    order = list(range(len(blocks)))
    random.Random(f"facts {seed}").shuffle(order)
    for row in order:
        owner = row if blocks.passages is None else int(blocks.passages[row].mode().values)
        if owner in owners or len(places) == count:
            continue
        place = _rare_word(blocks.input_ids[row].tolist(), counts, tokenizer)
        if place is not None and place[1] not in {answer for _, answer in places}:
            places.append(place)
            owners.add(owner)
    answers = [answer for _, answer in places]
    generator, probes = random.Random(f"answers {seed}"), []
    for prompt, answer in places:
        others = [a for a in answers if a != answer and a not in prompt]
        if len(others) >= CANDIDATES - 1:
            chosen = (answer, *generator.sample(others, CANDIDATES - 1))
            probes.append(Probe("facts", tuple((*prompt, a) for a in chosen), len(prompt)))
    return probes


def _rare_word(
    ids: list[int], counts: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], int] | None:
    """Return (prompt, token) of the rarest new token in a block that is a word of four letters or more; None without one."""
    rare = sorted(range(_SHORTEST, len(ids)), key=lambda i: (int(counts[ids[i]]), i))
    for i in rare[:_LONGEST]:
        word = str(tokenizer.decode([ids[i]]))
        prompt = tuple(ids[max(0, i - _LONGEST) : i])
        if len(word.strip()) >= 4 and word.strip().isalpha() and ids[i] not in prompt:
            return prompt, ids[i]
    return None
