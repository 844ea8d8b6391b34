"""Entry point: `moe2dense` and `python -m moe2dense`. Bad input ends in one sentence and exit code 2."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from cyclopts import CycloptsError
from rich.console import Console
from rich.markup import escape

from moe2dense.cli.app import FIRST_WORDS, app
from moe2dense.conversion.results import Result
from moe2dense.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 2 for bad input; 3 for a conversion whose training gained nothing; 130 after Ctrl-C, 143 after SIGTERM. As one of several
    processes it ends such a conversion with 0: to torchrun every other code is a failure, for which it kills the rest.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    errors = Console(stderr=True, soft_wrap=True)
    if len(arguments) == 1 and arguments[0] in FIRST_WORDS:
        errors.print(FIRST_WORDS[arguments[0]], highlight=False, markup=False, end="")
        return 2
    format_of_python, warnings.formatwarning = warnings.formatwarning, _warning
    terminated: list[int] = []
    try:
        with _sigterm_as_ctrl_c(terminated):
            result = app(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        errors.print(f"[red]error:[/] {_plain(str(error))}", highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print(f"stopped{_how_to_continue(arguments)}", highlight=False)
        return 143 if terminated else 130
    finally:
        warnings.formatwarning = format_of_python
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return result.exit_code if isinstance(result, Result) and not launched else 0


@contextlib.contextmanager
def _sigterm_as_ctrl_c(received: list[int]) -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end the program as Ctrl-C does within the context; `received` then holds the signal."""

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Show a warning as one line of plain text, without the place in the code it comes from."""
    return f"warning: {message}\n"


def _how_to_continue(arguments: list[str]) -> str:
    if arguments[:1] != ["convert"]:
        return ""
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"; continue with: moe2dense {_plain(shlex.join(again))}"


def _plain(text: str) -> str:
    return escape(" ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
