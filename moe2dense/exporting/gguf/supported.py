"""Refuse a student that llama.cpp would not load, or would compute otherwise, before a byte of its file is written.

What is allowed was seen in the real runtime: tests/exporting/test_gguf.py runs every host, with and without biases, against
transformers.
"""

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.exporting.gguf.hosts import GgufHost
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.gated_ffn import gated_linears


def check_supported(model: PreTrainedModel, host: GgufHost) -> None:
    """Raise UserError naming the config field or tensor that llama.cpp has no counterpart of in this architecture."""
    for module in decoder_layers(model).modules():
        if not _gates_with_silu(module):
            value = getattr(model.config, "hidden_act", None)
            raise UserError(
                f"format: llama.cpp computes {host.arch} with silu, whatever the file says; the student's hidden_act is {value!r}; "
                "export --format hf"
            )
    config = model.config
    if host.equal_heads and config.num_key_value_heads != config.num_attention_heads:
        raise UserError(
            f"format: llama.cpp's {host.arch} has as many key heads as query heads, the student has {config.num_key_value_heads} and "
            f"{config.num_attention_heads}; export --format hf"
        )
    for name, _ in model.named_parameters():
        owner = name.split(".")[-2]
        if name.endswith(".bias") and ".layers." in name and "norm" not in owner and owner not in host.biases:
            raise UserError(
                f"format: llama.cpp's {host.arch} has no biases in {owner}, the student has ({name}); export --format hf"
            )


def _gates_with_silu(module: nn.Module) -> bool:
    """Return whether a module is no gated FFN, or one that computes silu(gate) * up."""
    pieces = gated_linears(module)
    if pieces is None:
        return True
    gate, up = torch.linspace(-4, 4, 17), torch.linspace(1, 2, 17)
    return torch.allclose(pieces.gating(gate, up), silu(gate) * up, atol=1e-6)
