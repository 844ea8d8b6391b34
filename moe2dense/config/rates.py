"""Learning rates by the shape of what is trained: given the rate that suits the example teacher, how it falls with width and depth."""

# the shape at which rates were chosen
HIDDEN_SIZE, LAYERS = 192, 4


def layer_rate(rate: float, hidden_size: int) -> float:
    """Return the rate of a fit within one layer at a hidden size, given that at 192; it is no higher below."""
    return rate * min(1.0, (HIDDEN_SIZE / hidden_size) ** 0.75)


def model_rate(rate: float, hidden_size: int, layers: int) -> float:
    """Return the rate that trains whole models of this shape, given that at hidden size 192 in 4 layers; it is no higher below.

    Steps of all layers add up in the hidden states, so the rate falls with the square root of the depth (2310.02244). The exponent
    of the width makes 1e-3 there 1e-4 at hidden size 4096 in 32 layers, which pruned models are distilled with (Minitron,
    2407.14679).
    """
    return rate * min(1.0, HIDDEN_SIZE / hidden_size) ** 0.41 * min(1.0, LAYERS / layers) ** 0.5


def heal_rate(rate: float, hidden_size: int, layers: int) -> float:
    """Return the rate of the heal for this shape, given that at hidden size 192 in 4 layers: with the depth it falls twice as fast.

    The heal has few tokens for many parameters. In 30 layers of hidden size 576 it learnt at 1.1e-4 and 5.8e-5 and not at 2.3e-4.
    """
    return model_rate(rate, hidden_size, layers) * min(1.0, LAYERS / layers) ** 0.5


def training_rate(hidden_size: int, layers: int, lora: bool = False) -> float:
    """Return AdamW's peak rate in training where none is set: 1e-3 at hidden size 192 in 4 layers; adapters take three times as much."""
    return model_rate(1e-3, hidden_size, layers) * (3 if lora else 1)
