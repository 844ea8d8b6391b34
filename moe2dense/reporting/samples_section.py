"""The section of what student and teacher wrote after the same prompts, worded for the page and the terminal."""

from typing import Any

from moe2dense.reporting.assemble import Report
from moe2dense.reporting.charts import number, percent
from moe2dense.reporting.definitions import QUALITY

WRITERS = {"student": "The student's", "teacher": "The teacher's", "text": "The held-out text's own"}


def samples_section(report: Report) -> dict[str, Any] | None:
    """{"how", "head", "rows" (a line for each writer), "samples"} of the report's samples; None where there are none."""
    samples = report.get("samples")
    if not samples:
        return None
    columns = [
        ("NLL by the teacher, nats/token", "teacher", QUALITY["written_teacher"]),
        ("NLL by the student, nats/token", "student", QUALITY["written_student"]),
        (f"NLL by the judge {samples.get('judge')}, nats/byte", "judge", QUALITY["written_judge"]),
        ("Distinct bigrams", "distinct", QUALITY["written_distinct"]),
    ]
    columns = [c for c in columns if c[1] != "judge" or samples.get("judge")]
    writers = [(w, samples["scores"][w]) for w in WRITERS if w in samples["scores"]]
    return {
        "how": how(samples),
        "head": [(label, text) for label, _, text in columns],
        "rows": [(WRITERS[w] + " continuation", [_cell(key, s.get(key)) for _, key, _ in columns]) for w, s in writers],
        "samples": [{**row, "texts": _texts(row)} for row in samples["rows"]],
    }


def _texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {"student": "Student", "teacher": "Teacher", "text": "Held-out text"}
    return [(title, row[who]) for who, title in shown.items() if row.get(who) is not None]


def _cell(key: str, value: float | None) -> str:
    return percent(value) if key == "distinct" else number(value)


def how(samples: dict[str, Any]) -> str:
    """One or two sentences on how the texts came about."""
    temperature = samples.get("temperature") or 0
    choice = "the likeliest token each time" if not temperature else f"drawn at temperature {temperature:g}, seeded"
    count = len(samples["rows"])
    first = f"{count} held-out prompt{'' if count == 1 else 's'} of {samples['prompt_tokens']} tokens, continued by {samples['tokens']}, {choice}."
    return f"{first} {samples.get('how') or ''}".strip()
