"""The one exception users are meant to see."""

import difflib


class UserError(ValueError):
    """Bad input: one clear sentence naming the argument, what was found and the remedy. The CLI exits with code 2."""


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean X?)' for the closest of `choices`, or ''."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
