"""The table of families is made of the cards and of what the tests saw, and of nothing else."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moe2dense.families.cards import student_host, teacher_cards
from tests.docs.pages import ROOT, pages
from tests.record_families import CHECKS, PLACE, Recorder, check_of

SEEN = json.loads(PLACE.read_text()) if PLACE.is_file() else {}


def test_the_page_is_current():
    done = subprocess.run([sys.executable, ROOT / "docs/generate_families.py", "--check"])
    assert done.returncode == 0, "run `python docs/generate_families.py`"


@pytest.mark.parametrize("family", sorted(teacher_cards()))
def test_the_row_of_a_family(family):
    card = teacher_cards()[family]
    host = student_host(card.host)
    cells = next(
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in pages()["docs/families.md"].splitlines()
        if line.startswith(f"| {family} |")
    )
    names = ", ".join(f"`{row.aliases[0]}`" for row in card.checkpoints if row.aliases) or "(pass a folder)"
    assert cells[:3] == [family, names, host.model_type + (" (one expert)" if host.moe_shaped else "")]
    for cell, check in zip(cells[3:6], ("streamed", "student", "converted"), strict=True):
        entry = SEEN.get(family, {}).get(check)
        assert cell == ("–" if entry is None else "seen" if entry["passed"] else "failed")
    assert cells[7:] == [host.loads[stack].split(":")[0] for stack in ("vllm", "llama_cpp")]


def test_only_families_that_have_a_card_were_seen():
    assert SEEN.keys() <= teacher_cards().keys()
    assert all(
        checks.keys() <= CHECKS.keys() and all(e["cases"] > 0 for e in checks.values()) for checks in SEEN.values()
    )


def report(nodeid, outcome, when="call"):
    return SimpleNamespace(
        nodeid=nodeid, when=when, passed=outcome == "passed", failed=outcome == "failed", skipped=outcome == "skipped"
    )


def test_a_run_records_what_its_tests_showed(tmp_path):
    place = tmp_path / "seen.json"
    place.write_text(json.dumps({"olmoe": {"converted": {"passed": True, "cases": 1, "date": "2026-01-01"}}}))
    recorder = Recorder(place)
    recorder.families = {
        "a1": ("mixtral", "streamed"),
        "a2": ("mixtral", "streamed"),
        "b": ("olmoe", "streamed"),
        "c": ("olmoe", "student"),
    }
    for row in (report("a1", "passed", "setup"), report("a1", "passed"), report("a2", "failed"), report("b", "passed")):
        recorder.pytest_runtest_logreport(row)
    recorder.pytest_runtest_logreport(report("c", "skipped"))
    recorder.pytest_runtest_logreport(report("unknown", "failed"))
    recorder.pytest_sessionfinish()
    written = json.loads(place.read_text())
    assert list(written) == ["mixtral", "olmoe"]
    assert written["mixtral"]["streamed"]["passed"] is False and written["mixtral"]["streamed"]["cases"] == 2
    assert written["olmoe"]["streamed"]["passed"] and written["olmoe"]["converted"]["date"] == "2026-01-01"
    assert "student" not in written["olmoe"] and written["mixtral"]["streamed"]["transformers"]


def test_the_tests_that_are_recorded_exist():
    """A test that was renamed would leave its column as it was."""
    for check, (file, test, parameter) in CHECKS.items():
        text = (ROOT / file).read_text()
        assert f"def {test}({parameter}" in text and check_of(file, test) == (check, parameter)
