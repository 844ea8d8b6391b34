"""Weights and optimiser state spread over processes with torch's FSDP2, and whole again for checkpoints."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moe2dense.distillation.objective import Objective


def shard(objective: Objective, device: torch.device) -> nn.Module:
    """Spread an `Objective` over all processes, layer by layer: each gathers one layer at a time.

    The objective may be on the CPU: layer by layer it is moved to the device and spread, so that no device ever holds all of it.
    On a GPU layers compute in bf16 and reduce gradients in float32. The optimiser must be made afterwards.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layer_classes = set(objective.model._no_split_modules or ())
    for module in list(objective.model.modules()):
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # the head and the embedding belong to the root, whose forward pass holds the loss
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    return objective


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor from all processes, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it, where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Spread a whole tensor the way `model` is spread."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
