"""Count the bytes of fitting a whole model: what rests between steps, and the activations of a pass. No torch here."""

from moe2dense.config.training import TrainConfig

_FLOAT, _HALF = 4, 2


def weight_bytes(config: TrainConfig) -> int:
    """Return the bytes of a weight while it trains."""
    return _HALF if config.weights == "bfloat16" else _FLOAT


def standing_bytes(config: TrainConfig, parameters: int, trained: int) -> int:
    """Return the bytes on the device of weights, gradients and moments alone, of so many parameters, `trained` of which train."""
    moments = 0 if config.offload else {"adamw-8bit": 2, "adafactor": 0}.get(config.optimizer, 8)
    gradients = 0 if config.step_in_backward else weight_bytes(config)
    return weight_bytes(config) * parameters + (moments + gradients) * trained


def activation_bytes(config: TrainConfig, tokens: int, layers: int, hidden: int, width: int) -> int:
    """Return the bytes of a pass of so many tokens at once through layers of a hidden size and an FFN's width, and of its gradients."""
    inside = tokens * (16 * hidden + 7 * width) * _FLOAT
    return inside + layers * tokens * hidden * _FLOAT if config.gradient_checkpointing else layers * inside
