"""Choose how a model attends: through dense masks (SDPA, or eager code where a family has no other), or through tiles (flex).

One setting holds for a process; `use_attention` applies it to a model before each pass. Masks through tiles are made where a mask is
needed at all: for packed documents, padding and sliding windows. Plain causal attention needs none, and stays with SDPA's own kernels.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from moe2dense.config.schema import ATTENTION
from moe2dense.errors import UserError, first_line
from moe2dense.modeling.block_masks import MaskRule, attend_by_rows, make_block_mask, masked_attention
from moe2dense.modeling.mask_memory import MaskUse

# N blocks, S block length, h heads
FLEX = "moe2dense_flex"
_EAGER = "eager"
_UNMASKED = "unmasked"  # no masks at all, for a rehearsal that adds their bytes
_LONG = (
    1024  # tokens of a block from which `auto` makes tiles: shorter dense masks are small, and need no kernel compiled
)
_LEAST_WIDTH = 16  # of a head, for torch's kernels
_PROBE_TOKENS = 256
# transformers' names of the implementations registered here -> (shortest block with tiles, whether plain causal passes have a mask too)
_KINDS = {FLEX: (0, False), "moe2dense_auto": (_LONG, False), "moe2dense_flex_always": (0, True)}
_NAMES = (*_KINDS, f"moe2dense_{_UNMASKED}")
_functions, _mask_makers = AttentionInterface(), AttentionMaskInterface()
_setting = ["auto"]


@contextlib.contextmanager
def attention_setting(name: str) -> Iterator[None]:
    """Let every model of this process attend as `name` says within the context. Raises UserError for an unknown name."""
    if name not in (*ATTENTION, _EAGER, _UNMASKED):
        raise UserError(f"attention must be one of {', '.join(ATTENTION)}; found {name!r}")
    _setting.append(name)
    try:
        yield
    finally:
        _setting.pop()


def unmasked() -> contextlib.AbstractContextManager[None]:
    """Let models that attend by SDPA make no masks within the context, so that nothing of what they give means anything but its size."""
    return attention_setting(_UNMASKED)


@contextlib.contextmanager
def eager_attention(config: PreTrainedConfig, wanted: bool = True) -> Iterator[None]:
    """Let the model of this config compute attention in the open within the context: nothing else returns its maps."""
    if not wanted:
        yield
        return
    config = config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _EAGER
    try:
        with attention_setting(_EAGER):
            yield
    finally:
        config._attn_implementation = before


def use_attention(model: PreTrainedModel, device: torch.device) -> str:
    """Let a model attend on a device as the process's setting says; return transformers' name of what it uses then.

    `auto` takes tiles on a GPU, for blocks of 1024 tokens and more, where the model and torch's kernels can. An implementation that a
    user loaded the model with stays, unless another is asked for. Raises UserError where `flex` is asked for and cannot be.
    """
    config, asked = model.config.get_text_config(), _setting[-1]
    usual = "sdpa" if model._supports_sdpa else _EAGER
    current = config._attn_implementation or usual
    if asked == _EAGER or (asked == "auto" and current not in (usual, *_NAMES)):
        return current
    wanted = f"moe2dense_{_UNMASKED}" if asked == _UNMASKED and usual != _EAGER else usual
    if asked == "flex" or (asked == "auto" and device.type == "cuda"):
        fault = flex_fault(model, device)
        if fault and asked == "flex":
            raise UserError(f"--attention flex: {type(model).__name__} {fault}; use --attention auto")
        if not fault:
            wanted = "moe2dense_flex_always" if usual == _EAGER else f"moe2dense_{asked}"
    if config._attn_implementation != wanted:
        config._attn_implementation = wanted
    return wanted


def model_fault(model: PreTrainedModel) -> str:
    """Return why a model cannot attend through tiles on any device, as the end of a sentence; '' where it can."""
    dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    if not model._supports_flex_attn:
        return "has no flex attention in transformers"
    return f"trains with attention_dropout={dropout}, which flex attention does not have" if dropout else ""


def mask_use(model: PreTrainedModel, device: torch.device, length: int, documents: bool) -> MaskUse:
    """Return how this process's passes of a model over blocks of this length make their masks. documents: blocks hold several."""
    name = use_attention(model, device)
    return MaskUse(documents, name in _KINDS and length >= _KINDS[name][0])


def planned_mask_use(model: PreTrainedModel, asked: str, on_gpu: bool, length: int, documents: bool) -> MaskUse:
    """Return the same for the machine of a plan, which may be another one."""
    tiles = asked == "flex" or (asked == "auto" and on_gpu and length >= _LONG)
    return MaskUse(documents, tiles and not model_fault(model))


def flex_fault(model: PreTrainedModel, device: torch.device) -> str:
    """Return why a model cannot attend through tiles on a device, as the end of a sentence; '' where it can."""
    config = model.config.get_text_config()
    if (fault := model_fault(model)) or device.type != "cuda":
        return fault
    if not has_triton():
        return "needs triton on a GPU, which is not installed here"
    widths = _head_widths(config)
    if min(map(min, widths)) < _LEAST_WIDTH:
        return f"has heads of {min(map(min, widths))} numbers, and torch's kernels take {_LEAST_WIDTH} or more"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    return next((fault for pair in sorted(widths) if (fault := _kernel_fault(device, *pair, dtype))), "")


def _head_widths(config: PreTrainedConfig) -> set[tuple[int, int]]:
    """Return the widths of a model's heads: (of queries and keys, of values), of each kind of layer."""
    if getattr(config, "kv_lora_rank", None):  # latent attention
        return {(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)}
    usual = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = {usual, getattr(config, "global_head_dim", None) or usual}
    return {(width, width) for width in widths}


@functools.cache
def _kernel_fault(device: torch.device, width: int, value_width: int, dtype: torch.dtype) -> str:
    """Return why torch's kernels do not run for heads of these widths on a GPU, after one small pass; '' where they do."""
    rows = torch.arange(_PROBE_TOKENS, device=device)

    def rule(_block: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (rows[query] - rows[key] < _PROBE_TOKENS)

    query, key, value = (
        torch.zeros(1, 2, _PROBE_TOKENS, w, device=device, dtype=dtype, requires_grad=True)
        for w in (width, width, value_width)
    )
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            mask = make_block_mask(rule, 1, _PROBE_TOKENS, device)
            torch.compile(flex_attention)(query, key, value, block_mask=mask).sum().backward()
    except Exception as error:  # a compiler fails in its own ways on each machine
        fault = f"has heads of {width} numbers in {dtype}, for which torch's kernels do not compile here ({first_line(error)})"
        warnings.warn(f"attention: a model {fault}; it attends through dense masks", stacklevel=2)
        return fault
    return ""


def _make_mask(
    least: int,
    always: bool,
    /,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskRule | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> BlockMask | Tensor | None:
    """Make the mask of a pass for transformers: none where plain causal attention does, tiles for whole blocks, else a dense one.

    mask_function: transformers' rule for a pair of tokens; attention_mask [N, S]: 0 = padding. A pass that continues from a cache has
    fewer queries than keys, and a dense mask.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    whole = isinstance(q_offset, int) and (q_offset, kv_offset, q_length) == (0, 0, kv_length)
    if not whole or kv_length < least or use_vmap or mask_function is None or "allow_is_bidirectional_skip" in others:
        return _mask_makers["sdpa"](
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap,
            allow_is_causal_skip=allow_is_causal_skip and not always, device=device, **others,
        )  # fmt: skip
    plain = allow_is_causal_skip and not padded and (local_size is None or kv_length < local_size)
    if plain and not always:
        return None
    rule = _without_padding(mask_function, attention_mask) if padded and attention_mask is not None else mask_function
    return make_block_mask(rule, batch_size, kv_length, torch.device(device))


def _without_padding(rule: MaskRule, attention_mask: Tensor) -> MaskRule:
    """Return a rule by which no query sees padding."""
    real = attention_mask.bool()

    def seen(block: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(block, head, query, key) & real[block, key]

    return seen


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend for transformers: through tiles by flex attention on a GPU and by rows elsewhere, through dense masks by SDPA.

    s_aux [h]: the scores of attention sinks. Returns [N, S, h, width of a value], and no maps.
    """
    if isinstance(attention_mask, BlockMask):
        if query.is_cuda:
            if torch.is_autocast_enabled("cuda"):
                query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
            flex: Callable[..., tuple[Tensor, Any]] = _functions["flex_attention"]
            return flex(module, query, key, value, attention_mask, scaling, softcap=softcap, s_aux=s_aux)[0], None
        rows = attend_by_rows(query, key, value, attention_mask, scaling, softcap, s_aux)
        return rows.transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None:
        sdpa: Callable[..., tuple[Tensor, None]] = _functions["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    seen = attention_mask
    if seen is None:
        queries, keys = query.shape[2], key.shape[2]
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    elif seen.dtype != torch.bool:
        seen = seen >= 0
    output = masked_attention(query, key, value, seen, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


for _name, _kind in _KINDS.items():
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, functools.partial(_make_mask, *_kind))
AttentionInterface.register(f"moe2dense_{_UNMASKED}", _attend)
AttentionMaskInterface.register(f"moe2dense_{_UNMASKED}", lambda **_: None)
