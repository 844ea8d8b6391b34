"""A pretended CUDA device with real values, for machines without one.

Within `PretendedCuda()` a tensor may be made on, or moved to, `cuda`. It is then a `PretendedTensor`: it says that it is on cuda:0, and
holds its values on the CPU. An operation on tensors of different devices raises RuntimeError where a GPU raises one, and is allowed
where a GPU allows it: copies, CPU scalars, and CPU indices into a tensor on the GPU. What runs where is counted (`counts.py`).

It works by two modes of torch. The function mode sees calls as they are written and replaces the device in their arguments. The dispatch
mode sees every operation and runs it on the values. For torch's own C++ code a pretended tensor is on `meta:1`, a device that nothing
else uses.

Autocast is not pretended, since torch decides on it by the real device: what trains in bf16 on a GPU trains in float32 here.
Kernels are the CPU's. What a GPU's kernels cannot do is not found.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.device.counts import Counts, place

CUDA = torch.device("cuda", 0)
_MARK = torch.device("meta", 1)  # what CUDA is called below Python
_CPU = torch.device("cpu")
_COPIES = {"_to_copy", "copy_", "copy"}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class PretendedTensor(Tensor):
    """A tensor that says it is on cuda:0; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendedTensor":
        return Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=_MARK
        )

    def __init__(self, values: Tensor):
        self.values = values

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"

    def get_device(self) -> int:
        return 0

    def record_stream(self, _stream: Any) -> None:
        """Do nothing: all work is done at once."""

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _types: Any, _args: Any = (), _kwargs: Any = None) -> Any:
        raise AssertionError(f"{operation} met a pretended tensor outside PretendedCuda, or in a thread of its own")


def _means_cuda(value: Any) -> bool:
    """Return whether an argument names the pretended device."""
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Calls(TorchFunctionMode):
    """Replace the device in calls, and answer what is asked of a tensor without an operation."""

    def __torch_function__(self, call: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(call, "__name__", "")
        if call is torch.device or name == "_parse_to":
            return call(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, PretendedTensor):
            if name == "numpy" and kwargs.get("force"):
                return first.cpu().numpy()
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            if name == "tolist":
                return first.cpu().tolist()
            if name == "cpu":
                return first.to("cpu")
            if name == "cuda":
                return first
            if name == "pin_memory":
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
            if name in ("element_size", "data_ptr"):
                return getattr(first.values, name)()
        elif name == "pin_memory":
            return first
        elif name == "cuda":
            return first.to(_MARK)  # type: ignore[union-attr]
        kwargs.pop("pin_memory", None)
        if name in ("tensor", "as_tensor", "asarray") and _means_cuda(kwargs.get("device")):
            kwargs.pop("device")
            return call(*args, **kwargs).to(_MARK)
        args = tuple(_MARK if _means_cuda(a) else a for a in args)
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = _MARK
        return call(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Run every operation on the values, where its tensors are together."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, operation: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = operation.overloadpacket
        name = packet.__name__
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        pretended = any(isinstance(t, PretendedTensor) for t in tensors)
        if pretended and name not in _COPIES:
            self._check_together(operation, name, args, tensors)
        asked = kwargs.get("device")
        # the function mode does not see calls of hooks, which ask for cuda itself
        onto = pretended if asked is None else torch.device(asked) == _MARK or _means_cuda(asked)
        if asked is not None and onto:
            kwargs["device"] = _CPU
        if not pretended and not onto:
            output = operation(*args, **kwargs)
            if not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):  # neither computes anything
                self.counts.add_product("cpu", packet, args, kwargs, output)
            return output
        if any(t.is_meta and not isinstance(t, PretendedTensor) for t in tensors):
            raise RuntimeError(f"{operation}: a tensor without storage met one on cuda:0 at {place()}")
        if asked is not None and not onto and torch.device(asked).type == "meta":
            return operation(*tree_map(_values, args), **tree_map(_values, kwargs))
        self._count_move(name, args, kwargs, onto, asked is not None)
        if pretended and name in _WAITS:
            self.counts.waits[place()] += 1
        generator = kwargs.get("generator")
        if generator is not None and onto and generator.device.type == "cpu":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' at {place()}")
        own_args, own_kwargs = tree_map(_values, args), tree_map(_values, kwargs)
        output = _run(operation, name, own_args, own_kwargs)
        self.counts.add_product("cuda", packet, own_args, own_kwargs, output)
        written = _written(operation, args, kwargs)
        if written and operation._schema.returns:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda x: PretendedTensor(x) if onto and isinstance(x, Tensor) else x, output)

    def _check_together(self, operation: Any, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Raise RuntimeError where tensors of several devices meet as no GPU allows."""
        others = [t for t in tensors if not isinstance(t, PretendedTensor) and t.ndim > 0]
        if name in _INDEXED and isinstance(args[0], PretendedTensor):
            indices = [id(x) for x in tree_flatten(args[1])[0]]
            others = [t for t in others if id(t) not in indices]
        if others:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and {others[0].device} "
                f"in {operation} at {place()}"
            )

    def _count_move(self, name: str, args: tuple, kwargs: dict, onto: bool, asked: bool) -> None:
        """Count the bytes that cross the bus."""
        if name == "_to_copy" and asked and isinstance(args[0], PretendedTensor) != onto:
            self.counts.moved["to cuda" if onto else "to cpu", place()] += args[0].nbytes
            if not onto and not kwargs.get("non_blocking"):
                self.counts.waits[place()] += 1
        elif name == "copy_" and isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor):
            to_cuda = isinstance(args[0], PretendedTensor)
            if args[1].ndim:
                self.counts.moved["to cuda" if to_cuda else "to cpu", place()] += args[1].nbytes


def _values(x: Any) -> Any:
    return x.values if isinstance(x, PretendedTensor) else x


def _run(operation: Any, name: str, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the CPU, also where only a GPU has it."""
    if name == "mm" and "dtype" in operation._overloadname:
        return args[0].to(args[2]) @ args[1].to(args[2])
    if name == "histc" and not args[0].is_floating_point():  # transformers counts tokens by expert with it
        return operation(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return operation(*args, **kwargs)


def _written(operation: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Return the arguments that an operation writes to: those it returns."""
    written = []
    for i, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            written += [] if value is None else [value]
    return written


class _Stream:
    """A stream of work, all of which is done at once here."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def record_event(self, _event: Any = None) -> "_Stream":
        return self

    def record(self, _stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _forget_accelerate() -> None:
    """Let accelerate look for devices anew: it remembers the first answer for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def PretendedCuda(free: int = 80_000_000_000, total: int = 85_000_000_000) -> Iterator[Counts]:
    """Have one CUDA device with `free` bytes within the context; yield what is counted."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "mem_get_info": lambda *_: (free, total),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: types.SimpleNamespace(name="a pretended GPU", total_memory=total),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _Stream(),
        "stream": lambda _stream: contextlib.nullcontext(),
        "_lazy_init": lambda: None,
    }
    counts, before = Counts(), torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        _forget_accelerate()
        stack.callback(_forget_accelerate)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a module that moves keeps its parameters
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        stack.enter_context(_Operations(counts))
        stack.enter_context(_Calls())
        yield counts
