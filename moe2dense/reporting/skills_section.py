"""The table of skills: which small exact tasks each model solves, and what the student keeps of its teacher's."""

from typing import Any

from rich.console import RenderableType

from moe2dense.common.numbers import UNKNOWN, show_percent
from moe2dense.reporting.definitions import row_title
from moe2dense.reporting.report_file import Report
from moe2dense.reporting.score_tables import SHORT_TITLES, plain_table, titled

AT_CHANCE = "at chance"


def skill_table(report: Report) -> dict[str, Any] | None:
    """Return {"head", "rows": [{"title", "help", "tasks", "cells", "kept"}], "chance"}; None where no skill was measured."""
    skills = report.get("skills")
    if not skills or not skills["skills"]:
        return None
    names: list[str] = list(skills["skills"][0]["scores"])
    rows = [
        {
            "title": row["title"],
            "help": f"{row['help']} {row['tasks']} tasks.",
            "tasks": row["tasks"],
            "cells": [_cell(row["scores"][name], skills["chance"]) for name in names],
            "kept": show_kept(row, skills["chance"]),
        }
        for row in skills["skills"]
    ]
    return {"names": names, "head": [row_title(name) for name in names], "rows": rows, "chance": skills["chance"]}


def show_kept(row: dict[str, Any], chance: float) -> str:
    """Return what the student keeps of a skill, as a share; in words where the teacher, or the student, may be guessing."""
    share = row["retention"].get("student")
    if share is None:
        return "teacher at chance"
    return AT_CHANCE if row["scores"]["student"]["low"] <= chance and share < 0.5 else show_percent(share)


def _cell(score: dict[str, float], chance: float) -> dict[str, Any]:
    """Return a share of solved tasks, its interval, and whether guessing would explain it."""
    interval = f"{show_percent(score['low'])} to {show_percent(score['high'])}"
    return {
        "text": show_percent(score["value"]),
        "interval": interval,
        "chance": score["low"] <= chance <= score["high"],
    }


def skills_in_terminal(report: Report) -> RenderableType | None:
    """Return the table for a terminal; None where no skill was measured."""
    skills = skill_table(report)
    if skills is None:
        return None
    table = plain_table("", *(SHORT_TITLES.get(str(name), str(name)) for name in skills["names"]), "kept")
    for row in skills["rows"]:
        cells = [f"{c['text']}{'*' if c['chance'] else ''}" for c in row["cells"]]
        table.add_row(row["title"].lower(), *cells, row["kept"] or UNKNOWN)
    title = f"skills: share of small tasks solved, guessing {show_percent(skills['chance'])} (* may be guessing)"
    return titled(title, table)
