"""Weights and optimiser state spread over processes with torch's FSDP2, and whole again for checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(objective: nn.Module, device: torch.device) -> nn.Module:
    """Spread an `Objective` over all processes, layer by layer: each gathers one layer at a time.

    On a GPU layers compute in bf16 and reduce gradients in float32. The optimiser must be made afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = objective.model
    whole_layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in whole_layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # the head and the embedding belong to the root, whose forward pass holds the loss
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    return objective


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its parts. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, shape: Tensor) -> Tensor:
    """A whole tensor spread the way `shape` is."""
    if not isinstance(shape, DTensor):
        return value
    return distribute_tensor(value.to(shape.device), shape.device_mesh, shape.placements)
