"""Try the commands on damaged inputs, and conversions that are killed, starved of disk or started twice.

python benchmarks/faults.py fuzz --count 1000 --seed 0     seeded mutations of every kind of input; what each try ended in
python benchmarks/faults.py fuzz --only 17                 one of those tries again, with what it printed
python benchmarks/faults.py kills --count 200 --seed 0     SIGKILL at random moments of a conversion, then --resume
python benchmarks/faults.py places                         full disk, read-only folder, cut shard, two runs on one folder

Every try is a process of its own, forked from one that has imported the package and done nothing else, with bounded memory
and time. Try N of a seed is always the same.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_inputs import KINDS, damage, make_inputs
from forked import finish, start_forked

MEMORY = 6 << 30  # bytes of address space that a try may add
SUCCESS, SENTENCE, TRACEBACK, HANG, MEMORY_OUT, HALF, UNCLEAR = OUTCOMES = (
    "success", "sentence", "traceback", "hang", "memory", "half-written", "exit 2, no sentence",
)  # fmt: skip

EQUAL, DIFFERENT, FAILED = "resumed equal", "different", "failed"


@dataclass(frozen=True)
class Ended:
    """How one process ended: exit code (negative: a signal), None after the timeout; what it printed; its seconds."""

    code: int | None
    printed: str
    seconds: float


def start(arguments: list[str], log: Path, memory: int = MEMORY) -> int:
    """Fork a process that runs one command and writes what it prints to `log`; return its id."""

    def command() -> int:
        from moe2dense.__main__ import main

        return main(arguments)

    return start_forked(command, log, memory)


def run(arguments: list[str], log: Path, timeout: float = 60) -> Ended:
    """Run one command in a process of its own."""
    began = time.monotonic()
    code = finish(start(arguments, log), timeout)
    return Ended(code, log.read_text(errors="replace"), time.monotonic() - began)


def prepare(folder: Path) -> None:
    """Write the inputs, then let the package itself make the run, the student and the targets."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if pid := os.fork():
        assert finish(pid, 300) == 0, "the inputs could not be made"
    else:
        make_inputs(folder)
        os._exit(0)
    log = folder / "log.txt"
    for command in (
        convert_command(folder, folder / "done"),
        f"targets {folder}/teacher --data {folder}/text --tokens 512 --block 32 --format topk --out {folder}/targets".split(),
    ):
        ended = run(command, log, 300)
        assert ended.code in (0, 3), ended.printed


def convert_command(inputs: Path, out: Path, resume: bool = False) -> list[str]:
    """Return the arguments of the small conversion."""
    if resume:
        return ["convert", "--out", str(out), "--resume"]
    words = (
        f"convert {inputs}/teacher --to 75% --data {inputs}/text --tokens 512 --config {inputs}/run.toml --no-control"
    )
    return [*words.split(), "--out", str(out)]


# --- fuzzing


@dataclass(frozen=True)
class Try:
    """One try and what it ended in."""

    number: int
    kind: str
    command: str
    how: str
    outcome: str
    line: str  # the last line printed, or the place of a traceback


def classify(ended: Ended, folder: Path) -> str:
    """Return the outcome of a process that worked in `folder`."""
    if ended.code is None:
        return HANG
    if ended.code not in (0, 2, 3):
        exhausted = any(words in ended.printed for words in ("MemoryError", "can't allocate memory", "bad_alloc"))
        return MEMORY_OUT if exhausted or ended.code in (-signal.SIGKILL, -signal.SIGABRT) else TRACEBACK
    leftovers = [p for p in folder.rglob("*") if ".partial-" in p.name or ".replaced-" in p.name or p.suffix == ".tmp"]
    if leftovers or ((folder / "out/model").is_dir() and not (folder / "out/model/config.json").is_file()):
        return HALF
    if ended.code in (0, 3):
        return SUCCESS
    errors = [line for line in ended.printed.splitlines() if line.startswith("error: ")]
    return SENTENCE if len(errors) == 1 and len(errors[0]) < 1500 else UNCLEAR


def fuzz_one(number: int, seed: int, inputs: Path, work: Path, timeout: float) -> tuple[Try, str]:
    """Damage one input and run one command on it; return the try and what was printed."""
    rng = random.Random(f"{seed}-{number}")
    name = list(KINDS)[number % len(KINDS)]
    kind, folder = KINDS[name], work / str(number)
    folder.mkdir(parents=True)
    for entry in inputs.iterdir():
        if entry.name == kind.copied:
            shutil.copytree(entry, folder / entry.name) if entry.is_dir() else shutil.copy(entry, folder / entry.name)
        else:
            (folder / entry.name).symlink_to(entry)
    files = sorted((folder / kind.copied).glob(kind.files)) if kind.files else [folder / kind.copied]
    file = rng.choice([f for f in files if f.is_file()])
    how = f"{file.relative_to(folder)}: {damage(file, rng)}"
    command = rng.choice(kind.commands).format(folder)
    ended = run(command.split(), folder / "log.txt", timeout)
    outcome = classify(ended, folder)
    lines = [line for line in ended.printed.splitlines() if line.strip()] or [f"(nothing; exit {ended.code})"]
    own = [line.strip() for line in lines if "/moe2dense/" in line and 'File "' in line]
    shown = lines[-1] + (f"  <- {own[-1].split('/moe2dense/')[-1]}" if outcome == TRACEBACK and own else "")
    shutil.rmtree(folder)
    return Try(number, name, command.split()[0], how, outcome, shown.replace(str(folder), "")[:300]), ended.printed


def fuzz(arguments: argparse.Namespace) -> int:
    """Run the tries and print the table; return 1 where any ended otherwise than in success or one sentence."""
    with workplace(arguments.work) as folder:
        inputs = folder / "inputs"
        if not (inputs / "targets/store.json").is_file():
            prepare(inputs)
        if arguments.only is not None:
            row, printed = fuzz_one(arguments.only, arguments.seed, inputs, folder / "tries", arguments.timeout)
            print(printed, row, sep="\n")
            return int(row.outcome not in (SUCCESS, SENTENCE))
        tries, until = [], time.monotonic() + 60 * arguments.minutes
        for number in range(arguments.first, arguments.first + arguments.count):
            if time.monotonic() > until:
                break
            tries.append(fuzz_one(number, arguments.seed, inputs, folder / "tries", arguments.timeout)[0])
            if tries[-1].outcome not in (SUCCESS, SENTENCE) or arguments.verbose:
                print(*vars(tries[-1]).values(), sep=" | ", flush=True)
    counts = Counter((t.kind, t.outcome) for t in tries)
    print_table("input", list(KINDS), OUTCOMES, counts)
    return int(any(t.outcome not in (SUCCESS, SENTENCE) for t in tries))


def print_table(title: str, rows: list[str], columns: tuple[str, ...], counts: Counter[tuple[str, str]]) -> None:
    """Print counts as a Markdown table with its sums."""
    print(f"\n| {title} | tries | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for row in [*rows, "all"]:
        numbers = [sum(n for (r, c), n in counts.items() if c == column and row in (r, "all")) for column in columns]
        print(f"| {row} | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")


@contextlib.contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """Yield the folder that was given, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="faults-") as name:
            yield Path(name)


# --- conversions that are killed


def model_hash(run_folder: Path) -> str:
    """Return the hash of the final model's weights; '' where there are none."""
    digest, files = hashlib.sha256(), sorted((run_folder / "model").glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else ""


def stage_of(folder: Path, order: list[str]) -> str:
    """Return the stage that a run folder was in: the first, in the order of a whole run, that is not finished."""
    if not (folder / "moe2dense.toml").is_file():
        return "before the run folder"
    if not (folder / "run.json").is_file():
        return "text"
    finished = json.loads((folder / "run.json").read_text())["stages"]
    return next((stage for stage in order if stage not in finished), "after the last stage")


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its folder, seconds, stages in their order, and the hash of its model."""

    folder: Path
    seconds: float
    stages: list[str]
    weights: str


def reference_run(inputs: Path, folder: Path, timeout: float) -> Reference:
    """Convert twice without interruption, and refuse to go on where the two results differ."""
    results = []
    for name in ("reference-a", "reference-b"):
        shutil.rmtree(folder / name, ignore_errors=True)
        ended = run(convert_command(inputs, folder / name), folder / "log.txt", timeout)
        assert ended.code in (0, 3), ended.printed
        results.append(ended.seconds)
    hashes = [model_hash(folder / name) for name in ("reference-a", "reference-b")]
    assert hashes[0] == hashes[1] != "", "two uninterrupted runs differ"
    stages = list(json.loads((folder / "reference-b/run.json").read_text())["stages"])
    return Reference(folder / "reference-b", sum(results) / 2, stages, hashes[0])


def kill_one(
    number: int, fraction: float, inputs: Path, folder: Path, reference: Reference, timeout: float
) -> tuple[str, str, str]:
    """Kill a conversion after a share of its time and resume it; return the stage, the outcome and the last line."""
    out, log = folder / f"killed-{number}", folder / "log.txt"
    pid = start(convert_command(inputs, out), log)
    code = finish(pid, fraction * reference.seconds)
    stage = stage_of(out, reference.stages)
    if code is not None:
        shutil.rmtree(out, ignore_errors=True)
        return "", "", ""
    resume = (out / "moe2dense.toml").is_file()
    ended = run(convert_command(inputs, out, resume), log, timeout)
    if ended.code not in (0, 3):
        outcome = FAILED
    else:
        outcome = EQUAL if model_hash(out) == reference.weights else DIFFERENT
    lines = ended.printed.splitlines() or [""]
    if outcome == EQUAL:
        shutil.rmtree(out)
    return stage, outcome, lines[-1]


def kills(arguments: argparse.Namespace) -> int:
    """Kill conversions at random moments, resume them and print the table; return 1 where any result differs."""
    with workplace(arguments.work) as folder:
        prepare(folder / "inputs")
        reference = reference_run(folder / "inputs", folder, 10 * arguments.timeout)
        print(
            f"an uninterrupted run takes {reference.seconds:.1f} s; stages: {', '.join(reference.stages)}", flush=True
        )
        rng, counts, killed = random.Random(arguments.seed), Counter(), 0
        until = time.monotonic() + 60 * arguments.minutes
        for number in range(4 * arguments.count):
            if time.monotonic() > until:
                break
            # One moment in each of `count` equal parts of the run, in random order: spread over all its stages.
            fraction = (rng.randrange(arguments.count) + rng.random()) / arguments.count
            stage, outcome, line = kill_one(
                number, fraction, folder / "inputs", folder, reference, 10 * arguments.timeout
            )
            if not stage:
                continue  # it had finished before that moment
            killed += 1
            counts[stage, outcome] += 1
            if outcome != EQUAL or arguments.verbose:
                print(number, f"{fraction:.3f}", stage, outcome, line, sep=" | ", flush=True)
            if killed == arguments.count:
                break
    order = ["before the run folder", "text", *reference.stages, "after the last stage"]
    print_table("killed in", order, (EQUAL, DIFFERENT, FAILED), counts)
    return int(any(outcome != EQUAL for _, outcome in counts))


def places(arguments: argparse.Namespace) -> int:
    """Try a full disk, a read-only folder, a cut shard and two runs on one folder; print what each ends in."""
    rows: list[tuple[str, str, bool]] = []
    with workplace(arguments.work) as folder:
        inputs, log, timeout = folder / "inputs", folder / "log.txt", 10 * arguments.timeout
        prepare(inputs)
        reference = reference_run(inputs, folder, timeout)

        def resumed(out: Path) -> bool:
            run(convert_command(inputs, out, (out / "moe2dense.toml").is_file()), log, timeout)
            return model_hash(out) == reference.weights

        size = sum(p.stat().st_size for p in reference.folder.rglob("*"))
        for share in arguments.shares:
            with memory_disk(folder / "disk", int(share * size)) as disk:
                ended = run(convert_command(inputs, disk / "out"), log, timeout)
                remount(disk, 8 * size)
                rows.append((f"full disk ({share:.0%} of the run's size)", describe(ended), resumed(disk / "out")))
        with memory_disk(folder / "disk", 8 * size) as disk:
            remount(disk, 8 * size, "ro")
            ended = run(convert_command(inputs, disk / "out"), log, timeout)
            remount(disk, 8 * size, "rw")
            rows.append(("read-only folder", describe(ended), resumed(disk / "out")))
        rows.append(cut_shard(inputs, folder, reference, timeout, resumed))
        rows.append(two_runs(inputs, folder, reference, timeout))
    print("\n| fault | ends in | then, with --resume, the same weights |\n|---|---|---|")
    for name, ending, equal in rows:
        print(f"| {name} | {ending} | {'yes' if equal else 'NO'} |")
    return int(not all(equal for *_, equal in rows))


def describe(ended: Ended) -> str:
    """Return an exit code and the last line that was printed."""
    lines = [line for line in ended.printed.splitlines() if line.strip()] or [""]
    return f"exit {ended.code}: {lines[-1][:200]}"


def cut_shard(
    inputs: Path, folder: Path, reference: Reference, timeout: float, resumed: Callable[[Path], bool]
) -> tuple[str, str, bool]:
    """Stop a run after its build, cut the teacher's last shard, resume; then put the shard back and resume again."""
    out, log = folder / "cut", folder / "log.txt"
    pid = start(convert_command(inputs, out), log)
    deadline = time.monotonic() + timeout
    while stage_of(out, reference.stages) in ("before the run folder", "text", "build") and time.monotonic() < deadline:
        time.sleep(0.01)
    finish(pid, 0)
    shard = sorted((inputs / "teacher").glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    ended = run(convert_command(inputs, out, resume=True), log, timeout)
    shard.write_bytes(data)
    return "the teacher's shard is cut between stages", describe(ended), resumed(out)


def two_runs(inputs: Path, folder: Path, reference: Reference, timeout: float) -> tuple[str, str, bool]:
    """Start two runs on one folder at once: one is refused, the other gives the usual weights."""
    out, logs = folder / "twice", [folder / "first.txt", folder / "second.txt"]
    pids = [start(convert_command(inputs, out), log) for log in logs]
    codes = [finish(pid, timeout) for pid in pids]
    lost = max(range(2), key=lambda i: codes[i] == 2)
    ending = describe(Ended(codes[lost], logs[lost].read_text(errors="replace"), 0))
    return "two runs on one folder", f"exit {codes[1 - lost]} and {ending}", model_hash(out) == reference.weights


@contextlib.contextmanager
def memory_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes at `folder` (needs root)."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, size: int, mode: str = "rw") -> None:
    """Give a mounted tmpfs another size or mode."""
    subprocess.run(["mount", "-o", f"remount,{mode},size={size}", str(folder)], check=True)


def main() -> int:
    """Read the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--work", type=Path, help="folder for inputs and tries; default: a temporary one")
    options.add_argument("--timeout", type=float, default=60, help="seconds of one process")
    options.add_argument(
        "--minutes", type=float, default=1e9, help="stop after so many, with the table of what was tried"
    )
    tried = commands.add_parser("fuzz", parents=[options])
    tried.add_argument("--count", type=int, default=1000)
    tried.add_argument("--first", type=int, default=0, help="number of the first try")
    tried.add_argument("--only", type=int, help="run this try alone and show what it printed")
    tried.add_argument("--verbose", action="store_true", help="print every try, not only those that end badly")
    tried.set_defaults(run=fuzz)
    killed = commands.add_parser("kills", parents=[options])
    killed.add_argument("--count", type=int, default=200)
    killed.add_argument("--verbose", action="store_true", help="print every kill, not only those that end badly")
    killed.set_defaults(run=kills)
    placed = commands.add_parser("places", parents=[options])
    placed.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=[0.02, 0.1, 0.3, 0.5, 0.7, 0.9],
        help="sizes of the full disk, in the run's",
    )
    placed.set_defaults(run=places)
    arguments = parser.parse_args()
    import_everything()
    return arguments.run(arguments)


def import_everything() -> None:
    """Import what the commands import, once, so that each try begins at its own work."""
    import importlib

    import moe2dense

    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", COLUMNS="200")
    root = Path(moe2dense.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.stem != "__main__":
            with contextlib.suppress(ImportError):  # optional packages
                importlib.import_module(".".join(("moe2dense", *path.relative_to(root).with_suffix("").parts)))
    importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    importlib.import_module("transformers.models.mistral.modeling_mistral")


if __name__ == "__main__":
    sys.exit(main())
