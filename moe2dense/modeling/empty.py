"""Build a causal language model without weights: every parameter on torch's meta device, which holds shapes and no storage."""

from typing import TYPE_CHECKING

from moe2dense.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(config: "PreTrainedConfig", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Return a causal language model of this config without storage; dtype None = the config's own.

    Raises UserError where transformers cannot build one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:  # every architecture fails in its own way on sizes that do not fit it
        raise UserError(
            f"config.json: transformers cannot build a {config.model_type!r} model of it ({type(error).__name__}: {first_line(error)}); "
            f"compare it with the published one"
        ) from error


def count_parameters(model: "nn.Module") -> int:
    """Return the number of parameters of a model, tied ones counted once; works on meta tensors."""
    return sum(p.numel() for p in model.parameters())
