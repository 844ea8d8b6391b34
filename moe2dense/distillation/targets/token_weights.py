"""Weights of single tokens in the loss: their names, and how recorded values become weights of mean 1."""

from typing import TYPE_CHECKING

from moe2dense.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# N blocks, S block length

# how each is measured: RoutingRecorder in distillation/targets/record.py
TOKEN_WEIGHTS = ("router-entropy", "expert-saliency")


def check_token_weights(name: str) -> None:
    """Raise UserError for a name that is not known."""
    if name not in TOKEN_WEIGHTS:
        raise UserError(
            f"token weights must be one of {', '.join(TOKEN_WEIGHTS)}; found {name!r}{nearest(name, list(TOKEN_WEIGHTS))}"
        )


def normalized(values: "Tensor", mask: "Tensor") -> "Tensor":
    """Scale token weights [N, S] to mean 1 over the tokens that count, mask [N, S]; 0 elsewhere.

    Raises UserError where all of them are 0.
    """
    weights = values.float().clamp(min=0) * mask
    mean = float(weights.double().sum() / mask.sum().clamp(min=1))
    if not mean > 0:
        raise UserError("token weights are 0 on every token; leave token_weights out")
    return weights / mean
