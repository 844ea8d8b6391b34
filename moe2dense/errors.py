"""The one exception that users are meant to see, and the pieces its sentences are made of."""

import difflib


class UserError(ValueError):
    """Bad input, in one clear sentence that names the argument, its value and the remedy. The CLI exits with code 2."""


def nearest(word: str, choices: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest of `choices`, or ''."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none.

    A line that only announces the next one (it ends in a colon) is given with it. At most 300 characters.
    """
    lines = str(error).strip().splitlines()
    line = " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
    return line[:300] or type(error).__name__
