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
from moe2dense.weights.formats.fp8 import FP8
from moe2dense.weights.formats.settings import METHODS, refusal


def check_quantization(path: Path | str, quantization: dict[str, Any] | None) -> None:
    """Raise UserError for a config whose weights are packed in a way that is not read here."""
    reason = refusal(quantization)
    if reason:
        raise UserError(
            f"teacher {path} {reason}; give a checkpoint that is not quantised, or one in {', '.join(METHODS)}"
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
            packed = skeleton.weights.packed.get(source.key)
            if packed is None:
                _check_dtype(skeleton, source)
            if name not in skeleton.weights.map.converters:
                _check_shape(skeleton, name, source, want)
            if packed is not None:
                packed.check(skeleton.checkpoint)
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
    """Raise UserError where a tensor that is not packed is not floating point."""
    info = skeleton.checkpoint[source.key]
    if info.dtype.is_floating_point and info.dtype not in FP8:
        return
    dtype = str(info.dtype).removeprefix("torch.")
    raise UserError(
        f"checkpoint file {info.file}: tensor {source.key!r} has dtype {dtype}"
        + (" and no tensor of scales beside it" if info.dtype in (torch.uint8, *FP8) else ", which is no weight")
    )


def _check_shape(skeleton: Skeleton, name: str, source: Source, want: Tensor) -> None:
    """Raise UserError where a tensor has not the shape of its part of parameter `name`."""
    packed, wanted = skeleton.weights.packed.get(source.key), tuple(want.shape)
    info = skeleton.checkpoint[source.key if packed is None else packed.codes]
    shape = info.shape if packed is None else packed.shape(skeleton.checkpoint)
    if source.expert is not None:
        wanted = (wanted[1] // source.parts, *wanted[2:])
    if shape != wanted:
        raise UserError(
            f"checkpoint file {info.file}: tensor {info.name!r} has shape {list(shape)}, the config says {list(wanted)}"
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
