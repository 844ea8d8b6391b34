"""What of the project was run on the pretended GPU of tests/device, as a table: families, options, regimes, commands, the CPU's share.

    python benchmarks/device_matrix.py                    # runs every test of tests/device: some hours on two cores
    python benchmarks/device_matrix.py -k mixtral         # those whose names say so
    python benchmarks/device_matrix.py a.xml b.xml        # makes the table of finished runs (pytest --junitxml) instead; later ones count

The CPU's share is the largest of all FLOPs of a test. Waits are those of the host for the GPU, per layer of a pass.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_NAME = re.compile(r"(?P<test>test_\w+?)(?:\[(?P<case>.*)\])?$")
# a test -> what it runs; the last part of its case may say where hidden states rest
KINDS = {
    "test_every_family": "conversions of families",
    "test_every_family_streams": "passes of families' teachers",
    "test_every_option": "options of convert",
    "test_every_init": "ways to make the FFNs (--init)",
    "test_every_regime": "training regimes",
}
PLACES = {
    "gpu": "resident, states on the GPU",
    "ram": "streamed, states in memory",
    "disk": "streamed, states on disk",
}


@dataclass(frozen=True)
class Outcome:
    """A test that ran: its kind, its place ("" where its name says none), whether it passed, its properties."""

    kind: str
    place: str
    passed: bool
    properties: dict[str, str]


def read_outcomes(files: Iterable[Path]) -> dict[str, Outcome]:
    """Return the outcome of each test in results files, by its name; that of a later file counts."""
    outcomes: dict[str, Outcome] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if case.find("skipped") is None:
                module, name = case.get("classname", ""), case.get("name", "")
                outcomes[f"{module}::{name}"] = _outcome(module, name, case)
    return outcomes


def _outcome(module: str, name: str, case: ElementTree.Element) -> Outcome:
    match = _NAME.match(name)
    assert match is not None, name
    parts = (match["case"] or "").split("-")
    place = next((part for part in (parts[0], parts[-1]) if part in PLACES), "")
    kind = KINDS.get(match["test"]) or ("commands" if module.endswith("test_commands") else "other tests")
    properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
    return Outcome(kind, place, case.find("failure") is None and case.find("error") is None, properties)


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table in Markdown, and the waits in a line below it."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kind, PLACES.get(outcome.place, "")), []).append(outcome)
    lines = ["| what | where | passed | largest share of the CPU |", "|---|---|---|---|"]
    order = [*KINDS.values(), "commands", "other tests"]
    for (kind, place), members in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        shares = [float(m.properties["cpu_share"]) for m in members if "cpu_share" in m.properties]
        share = f"{max(shares):.2%}" if shares else ""
        lines.append(f"| {kind} | {place} | {sum(m.passed for m in members)} of {len(members)} | {share} |")
    waits = next((json.loads(m.properties["waits"]) for g in groups.values() for m in g if "waits" in m.properties), {})
    if waits:
        places = ", ".join(
            f"`{place}` {number:g}" for place, number in sorted(waits.items(), key=lambda item: -item[1])
        )
        lines += ["", f"Waits of the host per layer of a pass: {sum(waits.values()):.3g} ({places})."]
    return "\n".join(lines)


def run_tests(chosen: str) -> list[Path]:
    """Run the tests, and return their results file."""
    results = Path(tempfile.mkdtemp()) / "results.xml"
    command = [sys.executable, "-m", "pytest", "tests/device", "-q", "-m", "slow or not slow", f"--junitxml={results}"]
    subprocess.call(command + (["-k", chosen] if chosen else []))
    return [results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results files of finished runs")
    parser.add_argument("-k", default="", dest="chosen", help="run only the tests whose names say so")
    args = parser.parse_args()
    print(table(read_outcomes(args.results or run_tests(args.chosen)).values()))


if __name__ == "__main__":
    main()
