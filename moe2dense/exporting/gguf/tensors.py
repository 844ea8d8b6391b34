"""Name a student's tensors as GGUF does, and cut and order them as llama.cpp reads them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.exporting.gguf.hosts import GgufHost
from moe2dense.exporting.gguf.package import package


def named_tensors(model: PreTrainedModel, host: GgufHost) -> Iterator[tuple[str, Tensor]]:
    """Yield (GGUF name, tensor) of every parameter, tied ones once. Raises UserError naming one that GGUF has no place for."""
    gguf = package()
    config = model.config
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[host.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    head_dim = head_size(config)
    for name, tensor in _parts(model, host):
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise UserError(f"format: gguf has no place for tensor {name} in the architecture {host.arch}")
        if host.interleaved and (".q_proj." in name or ".k_proj." in name):
            tensor = interleave(tensor, head_dim)
        yield key, tensor.squeeze(1) if tensor.dim() == 3 and host.conv else tensor
    frequencies = _llama3_factors(config, head_dim)
    if frequencies is not None:
        yield "rope_freqs.weight", frequencies


def _parts(model: PreTrainedModel, host: GgufHost) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter under a name that GGUF's list knows: those that it keeps apart one by one."""
    buffers = ((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    for name, parameter in (*model.named_parameters(remove_duplicate=True), *buffers):
        tensor = parameter.detach()
        if host.experts and ".experts." in name:
            yield from _experts(name, tensor, host.experts == "neighbours")
        elif host.latent and name.endswith("kv_b_proj.weight"):
            yield from _latent(name, tensor, model.config)
        elif name.endswith("e_score_correction_bias"):
            yield name.removesuffix("_bias") + ".bias", tensor
        elif name.endswith(".sinks"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


def _experts(name: str, tensor: Tensor, neighbours: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield gate, up or down of a layer's stacked experts [E, rows, columns], or their biases [E, rows].

    neighbours: gate and up alternate, and the matrices stand transposed (gpt-oss).
    """
    base, _, which = name.rpartition(".")
    kind = "bias" if which.endswith("_bias") else "weight"
    if neighbours and kind == "weight":
        tensor = tensor.transpose(1, 2)
    if not which.startswith("gate_up"):
        yield f"{base}.down_proj.{kind}", tensor.contiguous()
        return
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if neighbours else tensor.chunk(2, 1)
    yield f"{base}.gate_proj.{kind}", gate.contiguous()
    yield f"{base}.up_proj.{kind}", up.contiguous()


def _latent(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what a latent becomes: keys [heads, latent, nope] and values [heads, value, latent], of kv_b_proj."""
    heads = tensor.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
    keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2).contiguous()
    yield name.replace("kv_b_proj", "v_b_proj"), values.contiguous()


def interleave(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of Q or K [heads * D, H] (or a bias) from rotary halves (i, i + D/2) to pairs (2i, 2i + 1)."""
    parts = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return parts.transpose(1, 2).reshape(tensor.shape)


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama3_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return what llama3 rope scaling divides each frequency by (Llama 3.1's published rule), or None."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    frequency = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # in the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / rope["factor"])).float()
