"""Check before anything runs that every parameter has its tensors, in the shape and dtype the model needs. Nothing is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.modeling.internals import Source
from moe2dense.modeling.load import wrapper_hint
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.skeleton import Skeleton
from moe2dense.weights import bitsandbytes
from moe2dense.weights.packed import scale_grid

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_METHODS = ("fp8", "mxfp4", "bitsandbytes")


def check_quantization(path: Path, quantization: dict[str, Any] | None) -> None:
    """Raise UserError for a config whose weights are packed in a way that is not read here."""
    if not quantization:
        return
    old = (
        "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else "an unnamed method"
    )
    method = quantization.get("quant_method") or old
    if method not in _METHODS:
        raise UserError(
            f"teacher {path} is quantised with {method}, which cannot be read; "
            f"give a checkpoint that is not quantised, or one in {', '.join(_METHODS)}"
        )


def check_coverage(skeleton: Skeleton, layers: Sequence[Layer]) -> None:
    """Raise UserError naming the first parameter, expert or tensor that is missing or does not fit."""
    sources = skeleton.weights.map.sources
    for name, want in skeleton.shapes.items():
        if name not in sources:
            missing = [n for n in skeleton.shapes if n not in sources]
            reason = (
                wrapper_hint(skeleton.ignored, missing) or _untied(skeleton, name) or "the checkpoint is incomplete"
            )
            raise UserError(f"checkpoint {skeleton.path}: no tensor for parameter {name!r}; {reason}")
        for source in sources[name]:
            _check_dtype(skeleton, source)
            if name not in skeleton.weights.map.converters:
                _check_shape(skeleton, name, source, want)
            _check_scales(skeleton, source)
    for layer in layers:
        experts = layer.experts
        if experts is not None:
            for name in (n for n in sources if n.startswith(experts.prefix)):
                _check_experts(skeleton, name, len(experts))


def _untied(skeleton: Skeleton, name: str) -> str:
    """Return a sentence where the language-model head alone is missing and the config does not tie it, else ''."""
    if name != "lm_head.weight" or skeleton.embedding_name not in skeleton.weights.map.sources:
        return ""
    return (
        "config.json says that it is not tied to the embedding (tie_word_embeddings false), and transformers would start it at "
        "random; set tie_word_embeddings to true if the two are one, or give the whole checkpoint"
    )


def _check_dtype(skeleton: Skeleton, source: Source) -> None:
    """Raise UserError where a tensor is neither floating point nor packed with scales."""
    info = skeleton.checkpoint[source.key]
    packed = info.dtype in (torch.uint8, *_FP8) if source.scale else False
    packed = info.dtype == torch.int8 if source.scale.endswith(".SCB") else packed
    if packed or (info.dtype.is_floating_point and info.dtype not in _FP8):
        return
    dtype = str(info.dtype).removeprefix("torch.")
    raise UserError(
        f"checkpoint file {info.file}: tensor {source.key!r} has dtype {dtype}"
        + (" and no tensor of scales beside it" if info.dtype in (torch.uint8, *_FP8) else ", which is no weight")
    )


def _check_scales(skeleton: Skeleton, source: Source) -> None:
    """Raise UserError where the scales of a packed tensor are not as many, or not of the dtype, that unpacking it takes."""
    if not source.scale:
        return
    checkpoint, block = skeleton.checkpoint, skeleton.weights.block
    if source.from_bitsandbytes:
        bitsandbytes.check_scales(checkpoint, source.key)
        return
    info, scale = checkpoint[source.key], checkpoint[source.scale]
    if info.dtype == torch.uint8:
        fits, wanted = scale.shape == info.shape[:-1] and info.shape[-1:] == (16,), list(info.shape[:-1])
        what = f"one for each 32 values, {wanted}"
    else:
        fits = scale_grid(info.shape, scale.shape, block) is not None
        what = "one for the tensor, for each row, or for each block" + (f" of {block[0]} x {block[1]}" if block else "")
    if not fits:
        raise UserError(
            f"checkpoint file {scale.file}: the scales {source.scale!r} have shape {list(scale.shape)}, which does not fit "
            f"{source.key!r} of shape {list(info.shape)} ({what}); correct weight_block_size in config.json, or give a checkpoint "
            f"that is not quantised"
        )
    if not scale.dtype.is_floating_point and scale.dtype != torch.uint8:
        dtype = str(scale.dtype).removeprefix("torch.")
        raise UserError(f"checkpoint file {scale.file}: the scales {source.scale!r} have dtype {dtype}")


def _check_shape(skeleton: Skeleton, name: str, source: Source, want: Tensor) -> None:
    """Raise UserError where a tensor has not the shape of its part of parameter `name`."""
    info = skeleton.checkpoint[source.key]
    shape, wanted = info.shape, tuple(want.shape)
    if source.from_bitsandbytes:
        shape = bitsandbytes.shape_of(skeleton.checkpoint, source.key)
    elif info.dtype == torch.uint8:  # packed: [.., R, groups, 16 bytes], its last two dimensions are the input
        shape, wanted = (*shape[:-2], shape[-2] * shape[-1] * 2), (*wanted[:-2], wanted[-1], wanted[-2])
    if source.expert is not None:
        wanted = (wanted[1] // source.parts, *wanted[2:])
    if shape != wanted:
        raise UserError(
            f"checkpoint file {info.file}: tensor {source.key!r} has shape {list(shape)}, the config says {list(wanted)}"
        )


def _check_experts(skeleton: Skeleton, name: str, experts: int) -> None:
    """Raise UserError where an expert of parameter `name` has no tensor."""
    sources = skeleton.weights.map.sources[name]
    if sources[0].expert is None:
        return
    have = {(s.expert, s.part) for s in sources}
    for e in range(experts):
        if any((e, part) not in have for part in range(sources[0].parts)):
            raise UserError(
                f"checkpoint {skeleton.path}: expert {e} of parameter {name!r} is missing; the checkpoint is incomplete"
            )
