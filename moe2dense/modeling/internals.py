"""The only file that uses what transformers does not promise to keep.

It builds a model without weights, finds its tensors in a checkpoint, runs it layer by layer, and puts our own code where its
experts are. tests/modeling/test_internals.py fails loudly when any of this moves.
"""

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

from moe2dense.errors import UserError, first_line
from moe2dense.families.cards import layer_returns
from moe2dense.families.towers import as_text_model
from moe2dense.modeling.empty import empty_model

_HEAD = "lm_head."  # lies beside the language model, not in it, in most multimodal models


class DecoderModule(Protocol):
    """The part of a causal language model that owns the decoder layers."""

    config: PreTrainedConfig
    layers: nn.ModuleList
    embed_tokens: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor that a model parameter is made of, by the name that it has unpacked."""

    key: str
    expert: int | None = None  # None: all experts in one tensor, or not an expert
    part: int = 0  # of `parts` tensors that are put side by side: 0 gate, 1 up
    parts: int = 1


@dataclass
class KeyMap:
    """Where every parameter and saved buffer of a model comes from."""

    sources: dict[str, list[Source]] = field(default_factory=dict)
    # parameters that need transformers' own operation
    converters: dict[str, WeightConverter] = field(default_factory=dict)
    # of parameters that are stored as one tensor, the first, by whose name the operation goes
    first_of: dict[str, str] = field(default_factory=dict)
    # checkpoint tensors that the model has no place for
    ignored: list[str] = field(default_factory=list)
    # parameters that the config ties and the checkpoint holds both of
    tied: dict[str, str] = field(default_factory=dict)


def read_config(path: str) -> PreTrainedConfig:
    """Return the Hugging Face config of a folder. Raises UserError when there is none or its model_type is unknown."""
    try:
        return as_text_model(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # each architecture's config checks its fields in its own way
        raise UserError(f"teacher {path} has no readable config.json: {first_line(error)}") from error


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal LM of `config` on the meta device, with its unsaved buffers (rotary frequencies) real and on the CPU.

    The model gets its own copy of `config`, so nothing set here leaks into configs made from the caller's.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        delattr(config, "quantization_config")  # weights are dequantised as they are read
    model = empty_model(config, dtype)
    model.requires_grad_(False).eval()
    for module in model.modules():
        buffers: dict[str, Any] = module._buffers
        unsaved = [n for n in module._non_persistent_buffers_set if buffers.get(n) is not None]
        for name in unsaved:
            buffers[name] = torch.full_like(buffers[name], torch.nan, device="cpu")
        if unsaved:
            model._init_weights(module)
        for name in unsaved:
            assert not buffers[name].isnan().any(), f"{type(module).__name__}.{name} was left unset"
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # only matters to gradients; rows are looked up in a table of the rows in use
    return model


def move_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that no checkpoint holds (rotary frequencies) to the device that computes."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (value := module._buffers.get(name)) is not None:
                module._buffers[name] = value.to(device)


def causal_model_class(model_type: str) -> str:
    """Return the name of transformers' causal language model of an architecture, as its configs name it."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return names if isinstance(names, str) else names[0]


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name, ties included (the meta tensors, for shapes and dtypes)."""
    return dict(model.state_dict(keep_vars=True))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return {tied parameter: the parameter it shares storage with}; empty unless the config ties them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else {}


def _expert_number(converter: WeightConverter, pattern: str, key: str) -> int | None:
    """Return the number of the expert in a checkpoint key, or None where the pattern has no place for one."""
    if "*." not in pattern:
        return None
    match = re.search(pattern.replace("*.", r"(\d+)\."), key)
    assert match is not None, (converter, key)
    return int(match[1])


def map_keys(model: PreTrainedModel, keys: Iterable[str], prefix: str = "", stored_as: str = "") -> KeyMap:
    """Follow transformers' own renaming rules from the checkpoint's keys to the parameters of `model`.

    `keys`: names of weights as they are unpacked. `prefix`: what the checkpoint puts before the language model's names inside a
    multimodal model; of other tensors only a head of that name is the language model's, and the rest is ignored. `stored_as`:
    model_type whose rules the stored names follow, where it is another than the model's.
    """
    transforms = get_model_conversion_mapping(model)
    if stored_as:
        transforms = [*(get_checkpoint_conversion_mapping(stored_as) or []), *transforms]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    meta = saved_tensors(model)
    keys = list(keys)
    key_map = KeyMap()
    for key in keys:
        if not key.startswith((prefix, _HEAD)):
            key_map.ignored.append(key)
            continue
        name = key.removeprefix(prefix)
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if target not in meta and name in meta:
            target, pattern = name, None
        if target not in meta:
            key_map.ignored.append(key)
            continue
        source = Source(key)
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            expert = _expert_number(converter, pattern, apply_renamings(name, renamings))
            assert apply_converters(apply_renamings(name, renamings), converters)[1] == pattern
            part, parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
            source = Source(key, expert, part, parts)
            for other in converter.target_patterns[1:]:
                one_of_several = target.replace(converter.target_patterns[0], other)
                key_map.sources.setdefault(one_of_several, []).append(source)
                key_map.converters[one_of_several] = converter
                key_map.first_of[one_of_several] = target
            if expert is None:
                key_map.converters[target] = converter
        key_map.sources.setdefault(target, []).append(source)
    for name, twin in tied_names(model).items():
        if name in key_map.sources and twin in key_map.sources:
            key_map.tied[name] = twin
        elif name in key_map.sources:
            key_map.sources[twin] = key_map.sources[name]
        elif twin in key_map.sources:
            key_map.sources[name] = key_map.sources[twin]
    return key_map


def convert(key_map: KeyMap, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return a parameter that is not stored as it is used, through transformers' own conversion. `tensors` by checkpoint key."""
    converter, first = copy.deepcopy(key_map.converters[name]), key_map.first_of.get(name, name)
    for source in key_map.sources[name]:
        converter.add_tensor(first, source.key, converter.source_patterns[source.part], tensors[source.key])  # type: ignore[arg-type]
    converter.collected_tensors = {  # type: ignore[assignment]
        k: [(lambda t=t: t) for t in v] for k, v in converter.collected_tensors.items()
    }
    value = converter.convert(first, model=model, config=model.config)[name]
    return value[0] if isinstance(value, list) else value


@contextmanager
def hub_names(model: PreTrainedModel) -> Iterator[None]:
    """Save a model within the context under the names that its family has on the hub, one tensor an expert.

    A model that was loaded remembers how its tensors were named there, which may be as they are in memory.
    """
    remembered = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if remembered is not None:
            model.__dict__["_weight_conversions"] = remembered


def decoder(model: PreTrainedModel) -> tuple[str, DecoderModule]:
    """Return (name, module) of the part of a causal LM that owns the decoder layers. Raises UserError without one."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return name, cast(DecoderModule, module)
    raise UserError(f"{type(model).__name__} has no list of decoder layers called 'layers'; it cannot be streamed")


@contextmanager
def forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run the given functions in place of these modules' forwards within the context. Only these instances are touched."""
    try:
        for module, function in replacements.items():
            module.__dict__["forward"] = function
        yield
    finally:
        for module in replacements:
            module.__dict__.pop("forward", None)


def run_body(
    body: DecoderModule,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    layer: Callable[[int, Tensor, dict[str, Any]], Tensor],
    cache: Cache | None = None,
) -> Tensor:
    """Run transformers' own forward of the decoder with `layer(index, hidden, arguments)` in place of each decoder layer.

    Masks, positions and whatever else a family hands its layers come out of its own code. Returns the final, normed hidden state.
    `cache`: keys and values of earlier tokens (`new_cache`), handed to the layers, which extend it.
    """

    others = (None,) * (layer_returns(body.config.model_type) - 1)

    def stand_in(index: int) -> Callable[..., Any]:
        names = [*inspect.signature(type(body.layers[index]).forward).parameters][
            2:
        ]  # behind self and the hidden states

        def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = layer(index, hidden, {**dict(zip(names, args, strict=False)), **kwargs})
            return (output, *others) if others else output

        return call

    with forwards({module: stand_in(i) for i, module in enumerate(body.layers)}):
        out = body(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids,
            use_cache=cache is not None, **cache_arguments(body, cache),
        )  # fmt: skip
    return out.last_hidden_state


class _Recorded(Exception):
    """Ends a forward once the last layer's arguments are known."""


def layer_masks(config: PreTrainedConfig, position_ids: Tensor) -> list[Tensor | None]:
    """Return the attention mask that an architecture's own forward hands each of its layers for positions [N, S].

    Masks are floats [N, 1, S, S], the lowest number where a token is not seen; no weights are needed.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    body = decoder(build_skeleton(config, torch.float32))[1]
    masks: list[Tensor | None] = []

    def record(_: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        masks.append(arguments.get("attention_mask"))
        if len(masks) == len(body.layers):
            raise _Recorded
        return hidden

    blank = torch.zeros(*position_ids.shape, config.hidden_size)
    with contextlib.suppress(_Recorded), torch.no_grad():
        run_body(body, blank, None, position_ids, record)
    return masks


def masks_of_positions(
    config: PreTrainedConfig, position_ids: Tensor, dtype: torch.dtype
) -> dict[str, Tensor] | Tensor | None:
    """Return transformers' own masks for documents whose positions [N, S] start again at 0: one, or one for each layer type."""
    blank = torch.empty(*position_ids.shape, 0, dtype=dtype, device=position_ids.device)
    return create_masks_for_generate(config, blank, None, None, position_ids)


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache of keys and values (or states), as the family's own forward builds it."""
    return DynamicCache(config=config)


def cache_arguments(body: DecoderModule | nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """Return the keyword argument that hands `cache` to a decoder; none without a cache.

    transformers calls it `cache`; it was `past_key_values` before, and still is in models that bring their own code.
    """
    if cache is None:
        return {}
    return {_cache_argument(type(body)): cache}


@functools.cache
def _cache_argument(kind: type[Any]) -> str:
    """Return the name under which a class of decoders takes its cache."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def cache_of(output: ModelOutput) -> Cache:
    """Return the cache in a decoder's output, whatever the installed transformers calls it."""
    return output["cache" if "cache" in output else "past_key_values"]


def embed(body: DecoderModule, rows: Tensor, ids: Tensor) -> Tensor:
    """Run the family's own embedding module on a table of `rows` [U, H] and indices `ids` into it."""
    return torch.func.functional_call(body.embed_tokens, {"weight": rows}, (ids,))


def grouped_experts(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' grouped matrix products over an experts module whose weights are in memory."""
    return grouped_mm_experts_forward(experts, x, index, weights)
