"""Run programs that a model wrote: each in a process of its own with limits on time and memory, without network and without writing.

What is set: CPU seconds, address space, open files and written bytes (resource limits), a deadline after which every process of the
program is killed, an empty folder and environment, no other users' rights. Where the kernel allows it the process has no network at
all; opening sockets, starting programs and writing files is refused by Python besides. Files can be read. That stops accidents and
careless programs; whoever distrusts a model's text more runs the evaluation in a container.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moe2dense.common.units import parse_bytes

_CHILD = Path(__file__).parent / "sandbox_child.py"
_GRACE = 5.0  # seconds of the deadline beyond the CPU's limit: for starting, and for programs that sleep


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of CPU, bytes of address space."""

    seconds: int = 10
    memory: str = "1GB"


@dataclass(frozen=True)
class Outcome:
    """Whether a program came to its end, and the last line of its error where it did not."""

    passed: bool
    reason: str = ""


LIMITS = Limits()


def run_program(program: str, limits: Limits = LIMITS) -> Outcome:
    """Run a Python program to its end, within `limits`. It passes if no exception leaves it; ending early is no pass."""
    word = secrets.token_hex(16)  # only a program that comes to its end lets it be printed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        size = str(parse_bytes(limits.memory, "memory"))
        command = [*_without_network(), sys.executable, "-I", "-B", str(_CHILD), str(path), str(limits.seconds), size]
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.defpath}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            written, error = process.communicate(word + "\n", limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"not done within {limits.seconds + _GRACE:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0 and written.strip() == word:
        return Outcome(True)
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, f"more than {limits.seconds} s of CPU")
    lines = error.strip().splitlines()
    return Outcome(False, lines[-1][:200] if lines else "it ended early")


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return the command that starts another without network; nothing where the kernel does not allow it to this user."""
    command = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()
