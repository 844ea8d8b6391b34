"""How the learning rate and the weights of a loss change over a run: pure functions of the step."""

import math
from typing import Any

from moe2dense.errors import UserError, nearest

_SHAPES = ("constant", "linear", "cosine", "step")


def learning_rate(step: int, steps: int, peak: float, warmup: float, cooldown: float = 0.0) -> float:
    """Return a linear warmup over a share of the steps, then a cosine down to (almost) zero at the end. step counts from 0.

    cooldown: with it the rate stays at its peak and falls over the last share of the steps alone, as 1 - sqrt (warmup, stable, decay:
    2404.06395; the shape: 2405.18392).
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if cooldown:
        falling = min(steps - rising, math.ceil(cooldown * steps))
        share = max(0, step - (steps - falling) + 1) / (falling + 1)
        return peak * (1 - math.sqrt(share))
    share = (step - rising + 1) / (steps - rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def scheduled(value: float | str, step: int, steps: int) -> float:
    """Return a value that may change over the run.

    A number is constant; text is `linear:FROM:TO`, `cosine:FROM:TO` or `step:FROM:TO[:SHARE]` (changes at once after that
    share of the steps, default half). Raises UserError for anything else.
    """
    if isinstance(value, (int, float)):
        return float(value)
    shape, *numbers = value.split(":")
    try:
        values = [float(n) for n in numbers]
    except ValueError:
        values = []
    if shape not in _SHAPES or not values or len(values) > 3 or (shape != "constant" and len(values) < 2):
        try:
            return float(value)
        except ValueError:
            raise UserError(
                f"schedule {value!r} is not a number or SHAPE:FROM:TO with a shape of {', '.join(_SHAPES)}"
                f"{nearest(shape, list(_SHAPES))}"
            ) from None
    share = step / max(1, steps - 1)
    if shape == "constant":
        return values[0]
    if shape == "step":
        return values[0] if share < (values[2] if len(values) == 3 else 0.5) else values[1]
    mix = share if shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))
    return values[0] + (values[1] - values[0]) * mix


def with_temperature(options: dict[str, Any]) -> dict[str, Any]:
    """Return options by dotted key with what --temperature means in place of what was typed. Raises UserError."""
    typed = options.get("train.temperature")
    rest = {key: value for key, value in options.items() if key != "train.temperature"}
    return rest | {f"train.{key}": value for key, value in temperature_settings(typed).items()}


def temperature_settings(value: float | str | None) -> dict[str, Any]:
    """Return what --temperature sets of [train]: a number, `auto`, or a schedule. Raises UserError for anything else."""
    if value is None:
        return {}
    try:
        number = float(value)
    except ValueError:
        if value != "auto":
            _check_schedule(str(value))
        return {"temperature_schedule": value}
    if not number > 0:
        raise UserError(f"--temperature must be above 0; found {number:g}")
    return {"temperature": number, "temperature_schedule": ""}


def _check_schedule(value: str) -> None:
    try:
        ends = scheduled(value, 0, 2), scheduled(value, 1, 2)
    except UserError as error:
        raise UserError(f"--temperature must be a number, auto or a schedule; {error}") from None
    if min(ends) <= 0:
        raise UserError(f"--temperature must stay above 0; found {value!r}")
