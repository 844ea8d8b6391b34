"""Change the precision in which a model's weights rest."""

import torch
from torch import nn


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's parameters a dtype, in place; its buffers stay as they are.

    Rotary frequencies are buffers. Rounded to bfloat16 they would turn a token at position 2000 by some radians too far.
    """
    buffers = [(m, name, value) for m in model.modules() for name, value in m.named_buffers(recurse=False)]
    nn.Module.to(model, dtype)
    for module, name, value in buffers:
        setattr(module, name, value)
