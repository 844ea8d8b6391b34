"""The only file that uses transformers' internals: building a model without weights, finding its tensors in a checkpoint, running it
layer by layer, and putting our own code where its experts are. tests/teacher/test_adapter.py fails loudly when any of this moves.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)
from transformers.utils.generic import ModelOutput

from moe2dense.errors import UserError
from moe2dense.weights import bitsandbytes

_SCALES = re.compile(r"(_scale_inv|_scales)$")  # FP8's and MXFP4's peers of a weight
_BLOCKS = re.compile(r"_blocks$")  # MXFP4's packed values
# names of the linears of a gated FFN: gate, up, down; or gate and up in one, down
_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor that a model parameter is made of."""

    key: str
    expert: int | None = None  # None: all experts in one tensor, or not an expert
    part: int = 0  # of `parts` tensors that are put side by side: 0 gate, 1 up
    parts: int = 1
    scale: str = ""  # peer with the scales of a packed weight

    @property
    def from_bitsandbytes(self) -> bool:
        """Packed as bitsandbytes does it; always a linear's own tensor, never several experts."""
        return self.scale.endswith((".absmax", ".SCB"))


@dataclass
class KeyMap:
    """Where every parameter and saved buffer of a model comes from."""

    sources: dict[str, list[Source]] = field(default_factory=dict)
    converters: dict[str, WeightConverter] = field(
        default_factory=dict
    )  # parameters that need transformers' own operation
    ignored: list[str] = field(default_factory=list)  # checkpoint tensors that the model has no place for


def read_config(path: str, trust_remote_code: bool = False) -> Any:
    """The Hugging Face config of a folder. Raises UserError when there is none or its model_type is unknown."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"teacher {path} has no readable config.json: {str(error).splitlines()[0]}") from error


def build_skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of `config` on the meta device, with its unsaved buffers (rotary frequencies) real and on the CPU.

    The model gets its own copy of `config`, so nothing set here leaks into configs made from the caller's.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # weights are dequantised as they are read
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    for module in model.modules():
        unsaved = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        for name in unsaved:
            module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device="cpu")
        if unsaved:
            model._init_weights(module)
        for name in unsaved:
            assert not module._buffers[name].isnan().any(), f"{type(module).__name__}.{name} was left unset"
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # only matters to gradients; rows are looked up in a table of the rows in use
    return model


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, ties included (the meta tensors, for shapes and dtypes)."""
    return dict(model.state_dict(keep_vars=True))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """{tied parameter: the parameter it shares storage with}; empty unless the config ties them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else {}


def _match_number(converter: WeightConverter, pattern: str, key: str) -> int | None:
    if "*." not in pattern:
        return None
    match = re.search(pattern.replace("*.", r"(\d+)\."), key)
    assert match is not None, (converter, key)
    return int(match[1])


def _strip(key: str, prefix: str) -> str | None:
    return key.removeprefix(prefix) if key.startswith(prefix) else None


def map_keys(model: PreTrainedModel, keys: Iterable[str], prefix: str = "") -> KeyMap:
    """Follow transformers' own renaming rules from checkpoint keys to the parameters of `model`.

    `prefix`: what the checkpoint puts before the language model's names inside a multimodal model; other tensors are ignored.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    meta = saved_tensors(model)
    keys = list(keys)
    present, found = set(keys), KeyMap()
    for key in keys:
        name = _strip(key, prefix)
        if name is None:
            found.ignored.append(key)
            continue
        if bitsandbytes.owner(key) in present or (
            _SCALES.search(key) and (_SCALES.sub("", key) in present or _SCALES.sub("", key) + "_blocks" in present)
        ):  # read along with its weight
            continue
        plain = _BLOCKS.sub("", name)
        scale = next((s for s in (plain + "_scale_inv", plain + "_scales") if prefix + s in present), "")
        target, pattern = rename_source_key(plain, renamings, converters, model.base_model_prefix, meta)
        if target not in meta and plain in meta:
            target, pattern = plain, None
        if target not in meta:
            found.ignored.append(key)
            continue
        source = Source(key, scale=prefix + scale if scale else bitsandbytes.scale_of(key, present))
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            expert = _match_number(converter, pattern, apply_renamings(plain, renamings))
            assert apply_converters(apply_renamings(plain, renamings), converters)[1] == pattern
            part, parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
            source = Source(key, expert, part, parts, source.scale)
            if expert is None:
                found.converters[target] = converter
        found.sources.setdefault(target, []).append(source)
    for name, twin in tied_names(model).items():
        if twin in found.sources:
            found.sources[name] = found.sources[twin]
    return found


def convert(key_map: KeyMap, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """A parameter that is not stored as it is used, through transformers' own conversion. `tensors` by checkpoint key."""
    converter = copy.deepcopy(key_map.converters[name])
    for source in key_map.sources[name]:
        converter.add_tensor(name, source.key, converter.source_patterns[source.part], tensors[source.key])  # type: ignore[arg-type]
    converter.collected_tensors = {  # type: ignore[assignment]
        k: [(lambda t=t: t) for t in v] for k, v in converter.collected_tensors.items()
    }
    made = converter.convert(name, model=model, config=model.config)
    value = made[name]
    return value[0] if isinstance(value, list) else value


def decoder(model: PreTrainedModel) -> tuple[str, Any]:
    """(name, module) of the part of a causal LM that owns the decoder layers."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return name, module
    raise UserError(f"{type(model).__name__} has no list of decoder layers called 'layers'; it cannot be streamed")


@contextmanager
def forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the context, calling a module runs the given function instead of its forward. Only these instances are touched."""
    try:
        for module, function in replacements.items():
            module.__dict__["forward"] = function
        yield
    finally:
        for module in replacements:
            module.__dict__.pop("forward", None)


def run_body(
    body: Any,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    layer: Callable[[int, Tensor, dict[str, Any]], Tensor],
    cache: Any = None,
) -> Tensor:
    """transformers' own forward of the decoder with `layer(index, hidden, arguments)` in place of each decoder layer.

    Masks, positions and whatever else a family hands its layers come out of its own code. Returns the final, normed hidden state.
    `cache`: what earlier tokens left behind (`new_cache`), handed to the layers, which extend it.
    """

    def stand_in(index: int) -> Callable[..., Tensor]:
        def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert not args, "decoder layers are expected to take keyword arguments"
            return layer(index, hidden, kwargs)

        return call

    with forwards({module: stand_in(i) for i, module in enumerate(body.layers)}):
        out = body(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids,
            use_cache=cache is not None, **cache_arguments(body, cache),
        )  # fmt: skip
    return out.last_hidden_state


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache of keys and values (or states), as the family's own forward builds it."""
    return DynamicCache(config=config)


def cache_arguments(body: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """Return the keyword argument that hands `cache` to a decoder; none without a cache.

    transformers calls it `cache`; it was `past_key_values` before, and still is in models that bring their own code.
    """
    if cache is None:
        return {}
    return {_cache_argument(type(body)): cache}


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def cache_of(output: ModelOutput) -> Cache:
    """Return the cache in a decoder's output, whatever the installed transformers calls it."""
    return output["cache" if "cache" in output else "past_key_values"]


def embed(body: Any, rows: Tensor, ids: Tensor) -> Tensor:
    """The family's own embedding module on a table of `rows` [U, H] and indices `ids` into it."""
    return torch.func.functional_call(body.embed_tokens, {"weight": rows}, (ids,))


def _default_gate(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    return apply


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    for name in ("act_fn", "activation_fn", "activation"):
        act: Any = getattr(module, name, None)
        if callable(act):
            return cast(Callable[[Tensor], Tensor], act)
    return silu


def expert_gating(experts: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What an experts module makes of its gate and up projections: h = gating(gate, up)."""
    own = getattr(type(experts), "_apply_gate", None)
    if own is None or own.__name__ == "_default_apply_gate":
        return _default_gate(_activation(experts))
    side_by_side = getattr(experts, "is_concatenated", True)

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.cat((gate, up), -1) if side_by_side else torch.stack((gate, up), -1).flatten(-2)
        return own(experts, both)

    return apply


def has_plain_gating(experts: nn.Module) -> bool:
    """Whether an experts module computes silu(gate) * up, without biases."""
    own = getattr(type(experts), "_apply_gate", None)
    if own is None or own.__name__ != "_default_apply_gate" or getattr(experts, "has_bias", False):
        return False
    probe = torch.linspace(-3, 3, 7)
    return bool(torch.allclose(_activation(experts)(probe), silu(probe)))


def expert_layout(experts: nn.Module, stacked_dispatch: bool) -> tuple[bool, bool]:
    """(transposed: weights are [in, out]; interleaved: gate and up rows alternate) of an experts module's parameters."""
    transposed = bool(getattr(experts, "is_transposed", stacked_dispatch))
    return transposed, not getattr(experts, "is_concatenated", True)


@dataclass(frozen=True)
class GatedLinears:
    """The pieces of a dense gated FFN module: names of its linears, and its gating."""

    gate: str
    up: str  # "" when gate and up are one linear
    down: str
    gating: Callable[[Tensor, Tensor], Tensor]


def gated_linears(module: nn.Module) -> GatedLinears | None:
    """How to read a dense FFN module, or None when it is no gated FFN."""
    children = dict(module.named_children())
    for gate, up, down in _SPLIT:
        if {gate, up, down} <= children.keys():
            return GatedLinears(gate, up, down, _default_gate(_activation(module)))
    for gate, down in _FUSED:
        if {gate, down} <= children.keys():
            return GatedLinears(gate, "", down, _default_gate(_activation(module)))
    return None


def grouped_experts(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped matrix products over an experts module whose weights are in memory."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(experts, x, index, weights)
