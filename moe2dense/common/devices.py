"""Choose a device and ask what it has free, have a model on it for a while, and say how exact its products are."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from torch import Tensor, nn

from moe2dense.errors import UserError

CPU = torch.device("cpu")


def pick_device(device: str) -> torch.device:
    """Return a device by name; `auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu or cuda; found {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device; use device='cpu' or a torch built for CUDA")
    if chosen.type == "cuda" and chosen.index is None:  # tensors name their device by number
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free: of a GPU what it has left and what torch holds of it without use, else of this machine."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def device_with_room(wanted: torch.device | str, need: int) -> torch.device:
    """Return `wanted`, or the CPU where it is a CUDA device with less than `need` bytes left."""
    wanted = torch.device(wanted)
    return CPU if wanted.type == "cuda" and free_bytes(wanted) < need else wanted


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@contextlib.contextmanager
def moved_to(module: nn.Module, device: torch.device, spare: float = 0.25) -> Iterator[torch.device]:
    """Have a module on `device` within the context where it fits, and back where it was afterwards; yield where it is.

    A module that is on an accelerator already stays there. spare: room for activations, as a share of the module's size.
    """
    parameter = next(module.parameters(), None)
    before = device if parameter is None else parameter.device
    need = int((1 + spare) * parameter_bytes(module))
    if before == device or before.type != "cpu" or device_with_room(device, need) != device:
        yield before
        return
    module.to(device)
    try:
        yield device
    finally:
        module.to(before)


@contextlib.contextmanager
def fast_products(fast: bool = True) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in TF32 within the context, or, with fast=False, as they are.

    TF32 keeps 10 bits of each factor and adds in float32. On a CPU nothing changes.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = fast
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact_products() -> contextlib.AbstractContextManager[None]:
    """Multiply float32 matrices in float32 within the context: Gram matrices and what is solved with them."""
    return fast_products(False)


def by_rows(
    compute: Callable[..., Tensor], tensors: Sequence[Tensor], device: torch.device, rows: int = 16384
) -> Tensor:
    """Return compute(*tensors) for some rows at a time, computed on `device`; the result is where the first tensor is.

    Tensors that are all on `device` already are computed at once.
    """
    first = tensors[0]
    if all(t.device == device for t in tensors):
        return compute(*tensors)
    parts = [
        compute(*(t[i : i + rows].to(device, non_blocking=True) for t in tensors)).to(first.device)
        for i in range(0, max(1, len(first)), rows)
    ]
    return torch.cat(parts)
