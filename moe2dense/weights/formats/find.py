"""Tell which tensors of a checkpoint make a quantised weight, by their names and dtypes and by config.json's quantization_config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import TensorInfo
from moe2dense.weights.formats import bitsandbytes
from moe2dense.weights.formats.awq import AwqWeight
from moe2dense.weights.formats.bitsandbytes import BitsandbytesWeight
from moe2dense.weights.formats.fp4 import Fp4Weight
from moe2dense.weights.formats.fp8 import FP8, Fp8Weight
from moe2dense.weights.formats.gptq import GptqWeight
from moe2dense.weights.formats.integers import Int8Weight, PackedIntegers
from moe2dense.weights.formats.mxfp4 import Mxfp4Stack
from moe2dense.weights.formats.packed_weight import PackedWeight
from moe2dense.weights.formats.settings import Scheme, Settings, fp8_block, method_of, scheme_of, schemes

# scales of activations and of cached keys and values: weights are read, and computed with unrounded activations
_ACTIVATIONS = re.compile(r"(^|\.)(input|output|activation|[qkv]|kv)_(scale|scale_inv|global_scale|zero_point|amax)$")
_INPUT_FACTORS = ".pre_quant_scale"  # what ModelOpt's AWQ multiplies a layer's input with
_GROUPS = {"nvfp4": 16, "mxfp4": 32}  # values of a row that share a scale


@dataclass
class PackedWeights:
    """The quantised weights of a checkpoint, by the names that they would have unpacked.

    parts: every tensor that a packed weight is read from, or that belongs to it. activations: scales that weights do not need.
    """

    weights: dict[str, PackedWeight] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    activations: list[str] = field(default_factory=list)

    def names(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """Return the names of all weights, packed or not, in the checkpoint's order."""
        stands_for: dict[str, list[str]] = {}
        for key, weight in self.weights.items():
            stands_for.setdefault(weight.codes, []).append(key)
        aside = self.parts | set(self.activations)
        plain = {name: [name] for name in tensors if name not in aside}
        return [key for name in tensors for key in stands_for.get(name) or plain.get(name, [])]


def find_packed(tensors: Mapping[str, TensorInfo], settings: Settings | None) -> PackedWeights:
    """Return the packed weights among a checkpoint's tensors. Raises UserError for one that cannot be told how to unpack."""
    finder = _Finder(tensors, settings)
    packed = PackedWeights()
    for name in tensors:
        if name.endswith(_INPUT_FACTORS):
            raise UserError(
                f"checkpoint file {tensors[name].file}: tensor {name!r} scales a layer's input, which is not read; give a checkpoint "
                f"quantised by another algorithm, or one that is not quantised"
            )
        weight = finder.weight_of(name)
        if weight is not None:
            packed.weights[weight.key] = weight
            packed.parts.update(weight.tensors)
    if settings or packed.weights:
        packed.activations = [n for n in tensors if n not in packed.parts and _ACTIVATIONS.search(n)]
    packed.parts.update(n for n in tensors if bitsandbytes.owner(n) in packed.weights)
    return packed


class _Finder:
    """Names and dtypes of a checkpoint's tensors, and what its config says of them."""

    def __init__(self, tensors: Mapping[str, TensorInfo], settings: Settings | None):
        self.tensors, self.settings, self.method = tensors, settings or {}, method_of(settings)
        self.names, self.schemes = set(tensors), schemes(settings)

    def beside(self, name: str) -> str:
        """Return a tensor's name where it is there, else ""."""
        return name if name in self.names else ""

    def weight_of(self, name: str) -> PackedWeight | None:
        """Return the packed weight whose codes tensor `name` holds; None for any other tensor."""
        info = self.tensors[name]
        if name.endswith(".qweight"):
            return self._integers_by_method(name)
        if name.endswith("_packed"):
            return self._compressed(name, info)
        if name.endswith("_blocks") and (scales := self.beside(name.removesuffix("_blocks") + "_scales")):
            return Mxfp4Stack(name.removesuffix("_blocks"), (name, scales))
        if info.dtype in FP8:
            return self._fp8(name)
        if scales := bitsandbytes.scale_of(name, self.names):
            return BitsandbytesWeight(name, (name, scales))
        scale = self.beside(name + "_scale")
        if info.dtype == torch.int8 and scale:
            scheme = self._scheme(name)
            zeros = self.beside(name + "_zero_point")
            parts = tuple(n for n in (name, scale, zeros) if n)
            return Int8Weight(name, parts, scale, zeros, scheme.block, scheme.symmetric)
        if info.dtype == torch.uint8 and scale and (whole := self.beside(name + "_scale_2")):
            return Fp4Weight(name, (name, scale, whole), scale, whole, _GROUPS["nvfp4"])
        return None

    def _fp8(self, name: str) -> PackedWeight | None:
        """Return an FP8 weight; None where it has no scales beside it."""
        scales = next((s for s in (f"{name}_scale_inv", f"{name}_scale", f"{name}_scales") if s in self.names), "")
        if not scales:
            return None
        block = self._scheme(name).block if self.schemes else fp8_block(self.settings)
        if not self.schemes and self.method not in ("", "fp8"):  # the shape of the scales tells
            block = None
        return Fp8Weight(name, (name, scales), block)

    def _scheme(self, name: str) -> Scheme:
        """Return how config.json says that a weight is quantised. Raises UserError where it does not."""
        scheme = scheme_of(self.schemes, name.rpartition(".")[0])
        if scheme is None:
            info = self.tensors[name]
            raise UserError(
                f"checkpoint file {info.file}: tensor {name!r} is packed, and no group of quantization_config in config.json says how; "
                f"take config.json from the same place as the weights"
            )
        return scheme

    def _compressed(self, name: str, info: TensorInfo) -> PackedWeight | None:
        """Return a weight that compressed-tensors packs; None where its scales are missing."""
        key = name.removesuffix("_packed")
        scale, whole = self.beside(key + "_scale"), self.beside(key + "_global_scale")
        if not scale:
            return None
        if info.dtype == torch.uint8:
            parts = tuple(n for n in (name, scale, whole) if n)
            return Fp4Weight(key, parts, scale, whole, _GROUPS["nvfp4" if whole else "mxfp4"], divided=True)
        if self.beside(key + "_g_idx"):
            raise UserError(
                f"checkpoint file {info.file}: tensor {key + '_g_idx'!r} orders columns by activation, which is not read; give a "
                f"checkpoint quantised without it, or one that is not quantised"
            )
        scheme = self._scheme(name)
        zeros, shape = self.beside(key + "_zero_point"), self.beside(key + "_shape")
        zeros = "" if scheme.symmetric else zeros
        parts = tuple(n for n in (name, scale, shape, zeros) if n)
        return PackedIntegers(key, parts, scale, zeros, scheme.block, scheme.symmetric, scheme.bits, shape)

    def _integers_by_method(self, name: str) -> PackedWeight | None:
        """Return a weight of a GPTQ or AWQ checkpoint; None where its scales or zero points are missing."""
        module = name.removesuffix(".qweight")
        zeros, scales = self.beside(module + ".qzeros"), self.beside(module + ".scales")
        if not zeros or not scales:
            return None
        group = int(self.settings.get("group_size", self.settings.get("q_group_size", 128)))
        key = module + ".weight"
        if self.method == "awq":
            return AwqWeight(key, (name, zeros, scales), group)
        groups = self.beside(module + ".g_idx")
        parts = tuple(n for n in (name, zeros, scales, groups) if n)
        bits, minus_one = int(self.settings.get("bits", 4)), self.settings.get("checkpoint_format", "gptq") == "gptq"
        if groups:  # some modules may have other bits than the rest, which the shape tells
            bits = self.tensors[name].shape[0] * 32 // max(1, self.tensors[groups].shape[0])
        return GptqWeight(key, parts, bits, group, groups, minus_one)
