"""The one exception users are meant to see."""


class UserError(ValueError):
    """Bad input: one clear sentence naming the argument, what was found and the remedy. The CLI exits with code 2."""
