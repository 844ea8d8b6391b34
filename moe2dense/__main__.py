"""Entry point: `moe2dense` and `python -m moe2dense`. Bad input ends in one sentence and exit code 2."""

import shlex
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    from rich.console import Console

    from moe2dense.cli.app import app
    from moe2dense.errors import UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    errors = Console(stderr=True, soft_wrap=True)
    try:
        app(arguments, result_action="return_none", exit_on_error=False, print_error=False)
    except UserError as error:
        errors.print(f"[red]error:[/] {_plain(str(error))}", highlight=False)
        return 2
    except KeyboardInterrupt:
        remedy = ""
        if arguments[:1] == ["convert"]:
            again = arguments if "--resume" in arguments else [*arguments, "--resume"]
            remedy = f"; continue with: moe2dense {_plain(shlex.join(again))}"
        errors.print(f"stopped{remedy}", highlight=False)
        return 130
    except Exception as error:
        from cyclopts import CycloptsError

        if not isinstance(error, CycloptsError):
            raise
        errors.print(f"[red]error:[/] {_plain(str(error))}", highlight=False)
        return 2
    return 0


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
