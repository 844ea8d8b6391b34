"""Read config.json's quantization_config: by which method weights are quantised, and what of it is not read here. No torch is needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METHODS = ("fp8", "mxfp4", "bitsandbytes", "compressed-tensors", "gptq", "awq", "modelopt")
_OTHER_NAMES = {"modelopt_fp4": "modelopt", "modelopt_fp8": "modelopt"}
# layouts of compressed-tensors that are read
_LAYOUTS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
_MODELOPT = ("FP8", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION", "NVFP4_FP8_MIXED")

Settings = Mapping[str, Any]
Block = tuple[int, int]  # rows and columns of a weight that share a scale


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised, as a config group of compressed-tensors says."""

    targets: tuple[str, ...]  # names of modules, patterns after `re:`, or classes of modules such as Linear
    bits: int
    block: Block | None  # None: one scale for the tensor or for each row
    symmetric: bool


def method_of(settings: Settings | None) -> str:
    """Return the quantisation method, "" where weights are not quantised. Old configs of bitsandbytes do not name it."""
    if not settings:
        return ""
    old = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"
    method = str(settings.get("quant_method") or old)
    return _OTHER_NAMES.get(method, method)


def refusal(settings: Settings | None) -> str:
    """Return why weights quantised so cannot be read, as the end of a sentence that begins with the checkpoint; "" where they can."""
    method = method_of(settings)
    if settings is None or not method:
        return ""
    if method not in METHODS:
        return f"is quantised with {method}, which cannot be read"
    reason = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}.get(method, _modelopt)(settings)
    return f"is quantised with {method} {reason}, which cannot be read" if reason else ""


def _compressed_tensors(settings: Settings) -> str:
    """Return what of a compressed-tensors config is not read, else ""."""
    groups = [g for g in (settings.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    for layout in {str(s.get("format")) for s in (settings, *groups) if s.get("format")} - set(_LAYOUTS):
        return f"in the layout {layout}"
    sparse = settings.get("sparsity_config") or {}
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        return f"with sparse weights ({sparse['format']})"
    transforms = settings.get("transform_config") or {}
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        return "with rotations that are applied while the model runs (transform_config)"
    return ""


def _gptq(settings: Settings) -> str:
    """Return what of a GPTQ config is not read, else ""."""
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        return f"in the layout {layout}"
    return "" if settings.get("bits", 4) in (2, 3, 4, 8) else f"in {settings.get('bits')} bits"


def _awq(settings: Settings) -> str:
    """Return what of an AWQ config is not read, else ""."""
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if layout != "gemm":
        return f"in the layout {layout}"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        return f"in {bits} bits"
    return "" if settings.get("zero_point", True) else "without zero points"


def _modelopt(settings: Settings) -> str:
    """Return what of a ModelOpt config is not read, else ""; other methods pass."""
    algorithm = settings.get("quant_algo")
    known = method_of(settings) != "modelopt" or algorithm in (None, *_MODELOPT)
    return "" if known else f"by the algorithm {algorithm}"


def fp8_block(settings: Settings | None) -> Block | None:
    """Return the block of an FP8 weight that shares a scale, as the config says; None where it says that there are no blocks."""
    size = (settings or {}).get("weight_block_size", (128, 128))
    return (int(size[0]), int(size[1])) if size else None


def schemes(settings: Settings | None) -> list[Scheme]:
    """Return the config groups of compressed-tensors that quantise weights."""
    groups = (settings or {}).get("config_groups") or {}
    return [
        Scheme(
            tuple(str(t) for t in group.get("targets") or ()),
            int(weights.get("num_bits") or 8),
            _block(weights),
            bool(weights.get("symmetric", True)),
        )
        for group in groups.values()
        if isinstance(group, Mapping) and isinstance(weights := group.get("weights"), Mapping)
    ]


def _block(weights: Settings) -> Block | None:
    """Return rows and columns that share a scale; None for one scale for the tensor or for each row."""
    block, group = weights.get("block_structure"), weights.get("group_size")
    if weights.get("strategy") == "block" and block:
        return int(block[0]), int(block[1])
    return (1, int(group)) if isinstance(group, int) and group > 0 else None


def scheme_of(known: list[Scheme], module: str) -> Scheme | None:
    """Return the scheme of a module: by its name, else by a pattern, else by the class that all linear layers have.

    None where no group names it and there are several.
    """
    for matches in (lambda t: t == module, lambda t: t.startswith("re:") and bool(re.match(t[3:], module))):
        hit = next((s for s in known if any(matches(t) for t in s.targets)), None)
        if hit is not None:
            return hit
    classes = [s for s in known if any(t.isidentifier() for t in s.targets)]
    return classes[0] if classes else known[0] if len(known) == 1 else None
