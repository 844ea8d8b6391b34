"""Write the table of families in docs/families.md from the cards and docs/families_seen.json. With --check, only say whether it is current.

What a family can do was seen by the tests, which write docs/families_seen.json themselves (`make families`); nothing here is typed by hand.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from moe2dense.families.cards import StudentCard, TeacherCard, student_cards, teacher_cards

DOCS = Path(__file__).parent
PAGE, SEEN = DOCS / "families.md", DOCS / "families_seen.json"
BETWEEN = re.compile(r"(<!-- families -->\n).*(<!-- end of families -->)", re.DOTALL)
COLUMNS = (
    "family",
    "known names",
    "dense host",
    "streamed",
    "student",
    "converted",
    "transformers",
    "vLLM",
    "llama.cpp",
)
CHECKS = ("streamed", "student", "converted")

Seen = dict[str, dict[str, dict[str, Any]]]  # family, check, what was seen


def outcome(seen: Seen, family: str, check: str) -> str:
    """Whether the tests saw it: seen, failed, or nothing yet."""
    entry = seen.get(family, {}).get(check)
    return "–" if entry is None else "seen" if entry["passed"] else "failed"


def row(card: TeacherCard, host: StudentCard, seen: Seen) -> str:
    """Return one line of the table."""
    # the first name of each checkpoint stands for it
    names = ", ".join(f"`{checkpoint.aliases[0]}`" for checkpoint in card.checkpoints if checkpoint.aliases)
    shown = f"{host.model_type} (one expert)" if host.moe_shaped else host.model_type
    tested = [outcome(seen, card.model_type, check) for check in CHECKS]
    exported = outcome(seen, card.model_type, "transformers")
    loads = [host.loads.get(stack, "–").partition(":")[0] for stack in ("transformers", "vllm", "llama_cpp")]
    if exported != "–":
        loads[0] = exported
    return f"| {' | '.join([card.model_type, names or '(pass a folder)', shown, *tested, *loads])} |"


def summary(seen: Seen) -> str:
    """Return one sentence: how many families, and with which versions they were seen."""
    entries = [entry for checks in seen.values() for entry in checks.values()]
    days = sorted({entry["date"] for entry in entries})
    versions = [f"{name} {', '.join(sorted({e[name] for e in entries}))}" for name in ("transformers", "torch")]
    whole = sum(all(outcome(seen, f, c) == "seen" for c in CHECKS) for f in teacher_cards())
    when = f" between {days[0]} and {days[-1]}" if len(days) > 1 else f" on {days[0]}" if days else ""
    return f"{len(teacher_cards())} families; {whole} of them were streamed, built and converted by the tests{when}, with {' and '.join(versions)}."


def table(seen: Seen) -> str:
    """Return the whole table with its sentence."""
    hosts = student_cards()
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [
        row(card, hosts[card.host], seen) for card in sorted(teacher_cards().values(), key=lambda c: c.model_type)
    ]
    return "\n".join([summary(seen), "", *lines])


def main() -> int:
    """Write the page, or check it."""
    page = PAGE.read_text(encoding="utf-8")
    seen = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.is_file() else {}
    new = BETWEEN.sub(lambda m: f"{m[1]}\n{table(seen)}\n\n{m[2]}", page)
    if "--check" in sys.argv:
        return int(new != page or not BETWEEN.search(page))
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
