"""The one exception that users are meant to see, and the pieces its sentences are made of."""

import difflib


class UserError(ValueError):
    """Bad input, in one clear sentence that names the argument, its value and the remedy. The CLI exits with code 2."""


def nearest(word: str, choices: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest of `choices`, or ''."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
