"""Run a serving stack on a model for a while: on a free port, waited for, and ended with every process that it started."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from moe2dense.errors import UserError
from moe2dense.exporting.stacks import Stack

START = 600.0  # seconds that a stack may take until it answers
_END = 20.0  # seconds that it may take to end before it is killed
# where nothing else is set: vLLM on a CPU would reserve nearly all memory, however much other programs have
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GB
Value = TypeVar("Value")


@contextlib.contextmanager
def running(
    stack: Stack, model: Path, extra: tuple[str, ...], ready: Callable[[str], Value], start: float = START
) -> Iterator[Value]:
    """Start a stack on `model` and yield what `ready` makes of its URL; end it afterwards, whatever happens.

    ready: tries once, and raises UserError while the server is not there. Raises UserError with the last line that the program
    wrote where it ends before it answers, or takes longer than `start` seconds.
    """
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            stack.start(model, port, extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_SETTINGS | os.environ,
        )
        try:
            yield _reach(f"http://127.0.0.1:{port}", ready, process, log, stack, start)
        finally:
            _end(process)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _reach(
    url: str, ready: Callable[[str], Value], process: subprocess.Popen, log: IO[bytes], stack: Stack, start: float
) -> Value:
    """Wait until `ready` succeeds. Raises UserError where the process ends before, or takes too long."""
    deadline = time.monotonic() + start
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return ready(url)
        except UserError:
            time.sleep(0.5)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1][:200] if lines else "it said nothing"
    late = f" within {start:g} s" if process.poll() is None else ""
    raise UserError(f"{stack.name} does not start{late} ({reason})")


def _end(process: subprocess.Popen) -> None:
    """End a process and those it started: asked first, then killed."""
    for ask in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END)
