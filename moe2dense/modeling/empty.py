"""Build a causal language model without weights: every parameter on torch's meta device, which holds shapes and no storage."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(config: "PreTrainedConfig", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Return a causal language model of this config without storage; dtype None = the config's own."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def count_parameters(model: "nn.Module") -> int:
    """Return the number of parameters of a model, tied ones counted once; works on meta tensors."""
    return sum(p.numel() for p in model.parameters())
