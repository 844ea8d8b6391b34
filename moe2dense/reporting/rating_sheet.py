"""A blind rating sheet: which of two continuations is better, without saying who wrote which. The key is a file of its own."""

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe2dense.common.files import atomic_write

SHEET, KEY = "samples.csv", "samples-key.csv"


def rating_sheet(samples: Mapping[str, Any], seed: int = 0) -> tuple[str, str]:
    """(the sheet, its key) as CSV text: rows and sides are shuffled by `seed`; raters fill `better` with A, B or same.

    `samples` is the report's section of that name. The student stands against its teacher, or where the teacher wrote
    nothing against how the held-out text itself goes on.
    """
    rng = random.Random(seed)
    rows = list(samples["rows"])
    rng.shuffle(rows)
    swapped = [i % 2 == 1 for i in range(len(rows))]  # as often on either side
    rng.shuffle(swapped)
    sheet: list[Sequence[str]] = [("id", "prompt", "A", "B", "better", "remarks")]
    key: list[Sequence[str]] = [("id", "A", "B", "domain")]
    for number, row in enumerate(rows, 1):
        sides = ["student", "teacher" if row.get("teacher") is not None else "text"]
        if swapped[number - 1]:
            sides.reverse()
        sheet.append((str(number), row["prompt"], row[sides[0]], row[sides[1]], "", ""))
        key.append((str(number), *sides, row.get("domain") or ""))
    return _csv(sheet), _csv(key)


def write_sheet(samples: Mapping[str, Any], folder: str | Path, seed: int = 0) -> list[Path]:
    """Write samples.csv and samples-key.csv into `folder`."""
    paths = [Path(folder) / SHEET, Path(folder) / KEY]
    for path, text in zip(paths, rating_sheet(samples, seed), strict=True):
        atomic_write(path, text)
    return paths


def _csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
