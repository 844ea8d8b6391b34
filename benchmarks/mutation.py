"""Change one operator, number or condition of the numerical code at a time, and see whether a test notices.

    pip install cosmic-ray
    python benchmarks/mutation.py --count 200 --seed 0       a sample of all mutants, the score, and what no test noticed
    python benchmarks/mutation.py --only moe2dense/losses     of one package or file
    python benchmarks/mutation.py --mutant 1234               one of them: its change, and what its tests print

cosmic-ray makes the mutants. It runs tests in the place of the code itself, which a repository in use does not take well, and
loads torch for each; here every mutant is a process forked from one that has loaded torch and nothing of the package, and works on a
copy. A mutant counts as killed when one of its module's test files fails, or takes five times as long as without it.
"""

import argparse
import difflib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from forked import finish, start_forked

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 6 << 30  # bytes of address space that a mutant may add
LEAST_SECONDS = 20.0
KILLED, SLOW, SURVIVED = "killed", "too slow", "survived"

_LOSSES = ("tests/losses/test_divergences.py", "tests/losses/test_distillation.py")
_FEATURES = (
    "tests/losses/test_feature_match.py",
    "tests/losses/test_hidden_states.py",
    "tests/losses/test_registry.py",
)
_FFN = (
    "tests/student/ffn/test_fit.py", "tests/student/ffn/test_merge.py", "tests/student/ffn/test_refit_held_out.py",
    "tests/student/ffn/test_methods.py", "tests/student/ffn/test_device.py", "tests/student/build/test_build.py",
)  # fmt: skip
_STREAM = (
    "tests/teacher/test_slices.py",
    "tests/teacher/test_families.py",
    "tests/teacher/test_memory.py",
    "tests/teacher/test_observers.py",
)
# module -> the tests that should notice
TESTS: dict[str, tuple[str, ...]] = {
    "losses/divergences": _LOSSES, "losses/distillation": _LOSSES, "losses/tiled": _LOSSES, "losses/teacher_rows": _LOSSES,
    "losses/attention": _FEATURES, "losses/feature_match": _FEATURES, "losses/feature_spec": _FEATURES,
    "losses/hidden_states": _FEATURES, "losses/relations": _FEATURES, "losses/registry": _FEATURES,
    "teacher/experts": _STREAM, "teacher/stream": _STREAM, "teacher/lm_head": _STREAM, "teacher/buffers": _STREAM,
    "teacher/parameters": (*_STREAM, "tests/weights/test_packed.py"), "teacher/layers": _STREAM, "teacher/routing": _STREAM,
    "teacher/routing_report": ("tests/teacher/test_observers.py", "tests/teacher/test_tiny_mixtral.py"),
    "teacher/fake_quant": ("tests/teacher/test_fake_quant.py",),
    "teacher/sampled_routing": ("tests/teacher/test_sampled_routing.py",),
    "teacher/decode": ("tests/teacher/test_decode.py", "tests/generation/test_streamed.py"),
    **{
        f"student/ffn/{name}": _FFN
        for name in (
            "align", "average", "cluster", "concat", "dense", "energy", "errors", "local", "make", "obs", "randomized", "refit",
            "routed", "scores", "select", "svd", "symmetric", "task",
        )
    },
}  # fmt: skip
# `int | None` is written with the same operator as a union of dictionaries, and changing it means nothing
_LEFT_OUT = ("BitOr", "RemoveDecorator", "VariableReplacer", "VariableInserter", "NoOp", "ExceptionReplacer")


@dataclass(frozen=True)
class Mutant:
    """One change of one module. number: its place among all mutants of all modules."""

    number: int
    module: str  # "losses/tiled"
    operator: str
    occurrence: int

    @property
    def file(self) -> str:
        """The module's file, from the root of the repository."""
        return f"moe2dense/{self.module}.py"


def all_mutants() -> list[Mutant]:
    """Return every mutant of every module, in a fixed order."""
    from cosmic_ray.plugins import operator_names

    names = [n for n in sorted(operator_names()) if not any(part in n for part in _LEFT_OUT)]
    mutants: list[Mutant] = []
    for module in TESTS:
        source = (ROOT / f"moe2dense/{module}.py").read_text()
        for name in names:
            mutants += [Mutant(len(mutants) + i, module, name, i) for i in range(places(source, name))]
    return mutants


def places(source: str, operator: str) -> int:
    """Return at how many places of a source an operator of cosmic-ray can be used."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    mutation = get_operator(operator)()
    return sum(len(list(mutation.mutation_positions(node))) for node in ast_nodes(get_ast(source)))


def mutated(mutant: Mutant) -> tuple[str, str]:
    """Return the module's source as it is and as the mutant has it."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / mutant.file).read_text()
    return source, mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence) or source


def change(mutant: Mutant) -> str:
    """Return the lines that a mutant changes, as "file:line  - old  + new"."""
    before, after = (text.splitlines() for text in mutated(mutant))
    lines = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:3] not in ("---", "+++")]
    place = lines[0].split()[1].lstrip("-").split(",")[0] if lines else "?"
    return f"{mutant.file}:{place}  " + "  ".join(line[0] + " " + line[1:].strip() for line in lines[1:])


def make_copy(folder: Path) -> Path:
    """Copy what tests need into `folder`; large examples are links."""
    for name in ("moe2dense", "tests", "teachers", "students"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("examples", "docs", "benchmarks", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_tests(folder: Path, tests: tuple[str, ...], log: Path, seconds: float) -> int | None:
    """Run test files in a forked process; return its exit code, or None where it took longer than `seconds`."""

    def run_pytest() -> int:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        import pytest

        options = [
            "-q",
            "-x",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not gpu",
            f"--rootdir={folder}",
        ]
        return int(pytest.main([*options, f"--basetemp={folder / 'tmp'}", *tests]))

    return finish(start_forked(run_pytest, log, MEMORY), seconds)


def load_libraries() -> None:
    """Import what every test imports, and nothing of the package."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.mistral.modeling_mistral
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    torch.set_num_threads(1)
    assert "moe2dense" not in sys.modules, "a mutant must be imported by the process that tests it"


def outcomes(mutants: list[Mutant], folder: Path) -> Iterator[tuple[Mutant, str]]:
    """Test each mutant; yield it with what became of it. Raises AssertionError where tests fail without any change."""
    limits: dict[tuple[str, ...], float] = {}
    for mutant in mutants:
        tests = TESTS[mutant.module]
        if tests not in limits:
            began = time.monotonic()
            code = run_tests(folder, tests, folder / "log.txt", 900)
            assert code == 0, (folder / "log.txt").read_text()
            limits[tests] = max(LEAST_SECONDS, 5 * (time.monotonic() - began))
            print(f"<!-- {', '.join(tests)}: {time.monotonic() - began:.0f} s -->", flush=True)
        source, changed = mutated(mutant)
        (folder / mutant.file).write_text(changed)
        code = run_tests(folder, tests, folder / "log.txt", limits[tests])
        (folder / mutant.file).write_text(source)
        yield mutant, SLOW if code is None else SURVIVED if code == 0 else KILLED


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants drawn without replacement, in random order: a run that is stopped early has tried some of each module."""
    return random.Random(seed).sample(mutants, min(count, len(mutants)))


def package(mutant: Mutant) -> str:
    """Return the package of a mutant's module."""
    return mutant.module.rpartition("/")[0]


def print_table(results: list[tuple[Mutant, str]], total: Callable[[str], int]) -> None:
    """Print, for each package, how many mutants there are, how many were tried, and what became of them."""
    print("\n| package | mutants | tried | killed | too slow | survived | score |\n|---|---|---|---|---|---|---|")
    for name in [*dict.fromkeys(package(m) for m, _ in results), ""]:
        rows = [outcome for mutant, outcome in results if not name or package(mutant) == name]
        counts = [rows.count(k) for k in (KILLED, SLOW, SURVIVED)]
        score = 1 - counts[2] / len(rows)
        print(
            f"| {name or 'all'} | {total(name)} | {len(rows)} | " + " | ".join(map(str, counts)) + f" | {score:.0%} |"
        )


def main() -> None:
    """Try a sample of mutants and print the score and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of the sample")
    parser.add_argument("--only", default="", help="a package or file, such as moe2dense/losses")
    parser.add_argument("--mutant", type=int, nargs="+", help="numbers of single mutants")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    args = parser.parse_args()
    everything = [m for m in all_mutants() if m.file.startswith(args.only.removesuffix("/"))]
    wanted = sample(everything, args.count, args.seed)[args.skip :]
    if args.mutant:
        wanted = [m for m in everything if m.number in args.mutant]
    load_libraries()
    results: list[tuple[Mutant, str]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        folder = make_copy(Path(place))
        for mutant, outcome in outcomes(wanted, folder):
            results.append((mutant, outcome))
            if outcome != KILLED or args.mutant:
                print(f"{outcome}: {mutant.number}  {change(mutant)}", flush=True)
            if args.mutant:
                print((folder / "log.txt").read_text()[-3000:])
            if time.monotonic() - began > 60 * args.minutes:
                break
    print_table(results, lambda name: sum(not name or package(m) == name for m in everything))


if __name__ == "__main__":
    main()
