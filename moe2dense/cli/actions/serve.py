"""Start a serving stack on a student, as `moe2dense serve` asks. Loads no torch."""

import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from moe2dense.errors import UserError
from moe2dense.exporting.stacks import served_model, stack_for


def run_serve(what: Path, stack: str, port: int, dry_run: bool) -> None:
    """Print the command that serves a student and, unless dry_run, run it until it ends. Raises UserError for what cannot be served."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port must lie between 1 and 65535; found {port}")
    model = served_model(what)
    chosen, flags = stack_for(model, stack)
    command = chosen.start(model, port, tuple(flags))
    console = Console()
    console.print(shlex.join(command), highlight=False, markup=False, soft_wrap=True)
    if dry_run:
        return
    console.print(f"when it is up, it answers at http://127.0.0.1:{port}/v1", highlight=False, markup=False)
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        code = 0
    if code:
        sys.exit(code)
