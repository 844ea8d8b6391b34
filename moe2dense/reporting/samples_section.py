"""The section of what student and teacher wrote after the same prompts, worded for page and terminal."""

from typing import Any

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.reporting.definitions import MODEL
from moe2dense.reporting.report_file import Report

WRITERS = {"student": "The student's", "teacher": "The teacher's", "text": "The held-out text's own"}
TEXT_TITLES = {"student": "Student", "teacher": "Teacher", "text": "Held-out text"}


def samples_section(report: Report) -> dict[str, Any] | None:
    """Return {"how", "head", "rows" (a line for each writer), "samples"} of the report's samples; None where there are none."""
    samples = report.get("samples")
    if not samples:
        return None
    judge = samples.get("judge")
    columns = [
        ("teacher", "NLL by the teacher, nats/token"),
        ("student", "NLL by the student, nats/token"),
        *([("judge", f"NLL by the judge {judge}, nats/byte")] if judge else []),
        ("distinct", "Distinct bigrams"),
    ]
    writers = [(title, samples["scores"][writer]) for writer, title in WRITERS.items() if writer in samples["scores"]]
    return {
        "how": how_written(samples),
        "head": [(label, MODEL[f"written_{key}"].help) for key, label in columns],
        "rows": [
            (f"{title} continuation", [show_score(key, scores.get(key)) for key, _ in columns])
            for title, scores in writers
        ],
        "samples": [{**row, "texts": _texts(row)} for row in samples["rows"]],
    }


def _texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(title, row[writer]) for writer, title in TEXT_TITLES.items() if row.get(writer) is not None]


def show_score(key: str, value: float | None) -> str:
    """Show one number of a written text in its unit."""
    return show_percent(value) if MODEL[f"written_{key}"].unit == "%" else show_number(value)


def how_written(samples: dict[str, Any]) -> str:
    """Say in one or two sentences how the texts came about."""
    temperature = samples.get("temperature") or 0
    choice = (
        "taking the likeliest token each time" if not temperature else f"drawn at temperature {temperature:g}, seeded"
    )
    count = len(samples["rows"])
    first = (
        f"{count} held-out prompt{'' if count == 1 else 's'} of {samples['prompt_tokens']} tokens, "
        f"continued by {samples['tokens']} tokens, {choice}."
    )
    return f"{first} {samples.get('how') or ''}".strip()
