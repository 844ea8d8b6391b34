"""Write docs/families_seen.json from the tests themselves: `pytest --record-families tests/teacher/test_families.py ...`.

Each family has an entry for each check that was run: whether every case passed, the day, and the versions. Checks that were not run keep
the entries that they had. `docs/generate_families.py` makes a table of the file.
"""

import json
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[1] / "docs" / "families_seen.json"
# check = the test that shows it, and the name of its parameter that holds the family
CHECKS = {
    "streamed": ("tests/teacher/test_families.py", "test_logits", "family"),
    "student": ("tests/families/test_oracle.py", "test_the_student_is_the_teacher", "family"),
    "transformers": ("tests/families/test_oracle.py", "test_the_export_is_the_teacher_in_plain_transformers", "family"),
    "converted": ("tests/conversion/test_every_family.py", "test_convert", "teacher"),
}


def check_of(path: str, name: str) -> tuple[str, str] | None:
    """(check, the parameter with the family) that a test shows; None for any other test."""
    return next(((check, where) for check, (file, test, where) in CHECKS.items() if (path, name) == (file, test)), None)


class Recorder:
    """Gathers outcomes of the tests that show what a family can do, and writes them at the end."""

    def __init__(self, place: Path = PLACE):
        self.place = place
        self.outcomes: dict[tuple[str, str], list[bool]] = defaultdict(list)
        self.families: dict[str, tuple[str, str]] = {}  # test = (family, check)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Remember which tests show what of which family."""
        for item in items:
            if not isinstance(item, pytest.Function):
                continue
            found = check_of(item.path.relative_to(config.rootpath).as_posix(), item.originalname)
            if found is not None and item.callspec.params.get(found[1]):
                self.families[item.nodeid] = item.callspec.params[found[1]], found[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a test's outcome: a failure while it is set up counts, a skipped case does not."""
        known = self.families.get(report.nodeid)
        if known is not None and not report.skipped and (report.when == "call" or report.failed):
            self.outcomes[known].append(report.passed)

    def pytest_sessionfinish(self) -> None:
        """Write the file anew, with this run's outcomes in it."""
        seen = json.loads(self.place.read_text()) if self.place.is_file() else {}
        versions = {name: version(name) for name in ("transformers", "torch")}
        for (family, check), passed in self.outcomes.items():
            entry = {"passed": all(passed), "cases": len(passed), "date": date.today().isoformat(), **versions}
            seen.setdefault(family, {})[check] = entry
        ordered = {name: dict(sorted(seen[name].items())) for name in sorted(seen)}
        self.place.write_text(json.dumps(ordered, indent=1) + "\n")
