"""`moe2dense serve`: start the installed stack that serves a student, with the flags that its host needs."""

from pathlib import Path
from typing import Annotated, Literal

from moe2dense.config.flags import argument


def serve(
    what: Annotated[str, argument("Folder of a run or of an export, or a GGUF file.", example="out/first")],
    /,
    *,
    stack: Annotated[
        Literal["vllm", "llama.cpp", "mlx", "transformers"] | None,
        argument("The stack to start.", example="vllm", default="the first that is installed and serves the student"),
    ] = None,
    port: Annotated[int, argument("Where it listens, on this machine.", example="8080")] = 8000,
    dry_run: Annotated[bool, argument("Print the command and stop.")] = False,
) -> None:
    """Start the installed stack with the right flags and leave the terminal to it. Ctrl-C ends it."""
    from moe2dense.cli.actions.serve import run_serve

    run_serve(Path(what), stack or "", port, dry_run)
