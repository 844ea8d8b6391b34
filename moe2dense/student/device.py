"""Where a step of building computes: on the teacher's device where there is room, else on the CPU, where students are kept."""

import torch


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has left, and what torch holds of it without use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def with_room(wanted: torch.device | str, need: int) -> torch.device:
    """`wanted`, or the CPU where it is a CUDA device with less than `need` bytes left."""
    wanted = torch.device(wanted)
    return torch.device("cpu") if wanted.type == "cuda" and free_bytes(wanted) < need else wanted
