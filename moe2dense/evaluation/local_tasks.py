"""Tasks from local files that need no network: programs to complete (as HumanEval has them) and word problems (as GSM8K has them).

A task is a .jsonl file of one kind of record. {"prompt", "entry_point", "test"}: the prompt's program is completed, and passes if
`check(entry_point)` of the test does, in sandbox.py's limits. {"question", "answer"}: the last number that is written is compared with
the answer's; the first records of the file are shown as solved examples and are not scored.
"""

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from moe2dense.errors import UserError
from moe2dense.evaluation.sandbox import LIMITS, Limits, run_program
from moe2dense.evaluation.writers import Writer

PROGRAM, PROBLEM = ("prompt", "entry_point", "test"), ("question", "answer")
# what begins something else than the function that was asked for (the list that HumanEval's authors give)
_PROGRAM_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
_PROBLEM_STOPS = ("\nQuestion:",)
_NEW = {PROGRAM: 512, PROBLEM: 256}  # tokens that may be written
_SHOWN = 4  # solved examples before a word problem, or a fifth of the records where these are few
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class LocalTask:
    """A task file. kind: the fields of its records; shown: how many of the first are solved examples."""

    name: str
    kind: tuple[str, ...]
    records: list[dict[str, str]]
    shown: int = 0

    @property
    def metric(self) -> str:
        """Name what is measured."""
        return "pass@1" if self.kind == PROGRAM else f"exact match, {self.shown} shown"


def is_local(name: str) -> bool:
    """Return whether a task's name is that of a file of records."""
    return name.endswith(".jsonl")


def read_task(name: str) -> LocalTask:
    """Read a task file. Raises UserError for one that cannot be read, or whose records are of neither kind."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {name} cannot be read: {error}") from error
    records = [_record(name, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    kinds = [next((kind for kind in (PROGRAM, PROBLEM) if set(kind) <= record.keys()), ()) for record in records]
    if not records or not kinds[0] or any(kind != kinds[0] for kind in kinds):
        wanted = " or ".join(", ".join(kind) for kind in (PROGRAM, PROBLEM))
        raise UserError(f"--tasks {name} needs records that all have the fields {wanted}")
    if kinds[0] == PROBLEM:
        for number, record in enumerate(records, 1):
            if final_number(record["answer"]) is None:
                raise UserError(f"--tasks {name}: the answer of record {number} has no number")
    shown = min(_SHOWN, len(records) // 5) if kinds[0] == PROBLEM else 0
    return LocalTask(Path(name).stem, kinds[0], records, shown)


def _record(name: str, number: int, line: str) -> dict[str, str]:
    """Return one line's record. Raises UserError naming the line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"--tasks {name}: line {number} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"--tasks {name}: line {number} is no JSON object")
    return {str(key): str(value) for key, value in record.items()}


def score_task(
    task: LocalTask, writer: Writer, limit: int | None = None, limits: Limits = LIMITS
) -> dict[str, float | None]:
    """Return {"value", "stderr"}: the share of a task's first `limit` records that a model solves, greedily."""
    scored = task.records[task.shown :][:limit]
    if task.kind == PROGRAM:
        written = writer.write([record["prompt"] for record in scored], _NEW[PROGRAM], _PROGRAM_STOPS)
        programs = [_program(record, text) for record, text in zip(scored, written, strict=True)]
        with ThreadPoolExecutor(2) as pool:
            right = [outcome.passed for outcome in pool.map(lambda p: run_program(p, limits), programs)]
    else:
        before = "".join(f"{_question(r)} {r['answer']}\n\n" for r in task.records[: task.shown])
        prompts = [before + _question(record) for record in scored]
        written = writer.write(prompts, _NEW[PROBLEM], _PROBLEM_STOPS)
        right = [
            final_number(text) == final_number(record["answer"]) for record, text in zip(scored, written, strict=True)
        ]
    return _share(right)


def _program(record: dict[str, str], completion: str) -> str:
    return f"{record['prompt']}{completion}\n\n{record['test']}\n\ncheck({record['entry_point']})\n"


def _question(record: dict[str, str]) -> str:
    return f"Question: {record['question']}\nAnswer:"


def final_number(text: str) -> Decimal | None:
    """Return the number after "####" where there is one, else the last number of a text; None where there is none."""
    numbers = _NUMBER.findall(text.split("####", 1)[1]) if "####" in text else _NUMBER.findall(text)[-1:]
    try:
        return Decimal(numbers[0].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


def _share(right: Sequence[bool]) -> dict[str, float | None]:
    """Return the share of true values with its standard error; the error None for one record."""
    value = sum(right) / len(right) if right else 0.0
    error = math.sqrt(value * (1 - value) / (len(right) - 1)) if len(right) > 1 else None
    return {"value": value, "stderr": error}
