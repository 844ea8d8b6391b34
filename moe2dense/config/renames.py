"""Old names of options, so that a file of an earlier version is refused with the new name."""

from moe2dense.errors import nearest

# (table, old key) -> new key
_KEYS = {
    ("", "walk"): "build",
    ("build", "polish_epochs"): "heal_epochs",
    ("build", "polish_lr"): "heal_lr",
    ("build", "polish_batch"): "heal_batch",
    ("build", "polish_hints"): "heal_hints",
    ("regime", "companion_lr"): "peer_lr",
}
# (key, old value) -> new value
_VALUES = {("build.init", "walk"): "layerwise"}


def suggest_key(table: str, key: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for an unknown key of a table: its new name, else the closest one; '' where nothing is close."""
    new = _KEYS.get((table, key))
    return nearest(key, known) if new is None else f" (it was renamed; did you mean {new!r}?)"


def renamed_value(key: str, value: object) -> str | None:
    """Return the new name of a value that was renamed; None for any other."""
    return _VALUES.get((key, value)) if isinstance(value, str) else None
