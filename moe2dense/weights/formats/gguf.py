"""GGUF files as teachers: what their tensors are called in the hub's layout, and how each is unpacked, one expert at a time.

Values are unpacked by the `gguf` package. llama.cpp's converter stacks the experts of a layer, and for some architectures reorders the
rows of Q and K, whose rotary pairs it keeps side by side; both are undone here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint, TensorInfo
from moe2dense.weights.formats.find import PackedWeights
from moe2dense.weights.formats.packed_weight import PackedWeight
from moe2dense.weights.gguf_file import architecture

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")


@dataclass(frozen=True)
class GgufFamily:
    """One MoE architecture of GGUF. model_types: those of transformers that it holds. block: path of the MoE block on the hub."""

    model_types: tuple[str, ...]
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert
    interleaved: bool = False  # rotary pairs lie side by side in the rows of Q and K


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(("mixtral",), "block_sparse_moe", ("w1", "w3", "w2"), interleaved=True),
    "qwen2moe": GgufFamily(("qwen2_moe",)),
    "qwen3moe": GgufFamily(("qwen3_moe",)),
    "olmoe": GgufFamily(("olmoe",)),
    "minimax-m2": GgufFamily(("minimax_m2",), "block_sparse_moe", ("w1", "w3", "w2")),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_IN_BLOCK = {
    "ffn_gate_inp": "gate", "ffn_gate_inp_shexp": "shared_expert_gate", "ffn_gate_shexp": "shared_expert.gate_proj",
    "ffn_up_shexp": "shared_expert.up_proj", "ffn_down_shexp": "shared_expert.down_proj",
}  # fmt: skip
_CORRECTION = ("exp_probs_b", "bias")  # what is added to a router's scores to choose experts


@dataclass(frozen=True)
class GgufWeight(PackedWeight):
    """tensors: one of a GGUF file. expert: which of a stack; heads: of a matrix whose rotary pairs lie side by side, else 0."""

    expert: int | None = None
    heads: int = 0
    row: bool = False  # a vector that the hub keeps as a matrix of one row

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape in the hub's layout."""
        info = checkpoint[self.codes]
        shape = info.shape if not info.packing else (*info.shape[:-1], _values(info.packing, info.shape[-1]))
        shape = shape if self.expert is None else shape[1:]
        return (1, *shape) if self.row and len(shape) == 1 else shape

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for rows of Q or K that do not divide into heads."""
        rows = self.shape(checkpoint)[0]
        if self.heads and rows % (2 * self.heads):
            info = checkpoint[self.codes]
            raise UserError(
                f"checkpoint file {info.file}: tensor {info.name!r} has {rows} rows, which are not {self.heads} heads of pairs; "
                f"take config.json from the model that the file was made of"
            )

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop); of a stack only this expert's, of other matrices only these rows where their order is the hub's."""
        info = checkpoint[self.codes]
        if self.expert is not None:
            raw = checkpoint.read(self.codes, self.expert, self.expert + 1)[0][start:stop]
        elif self.heads or self.row:
            raw = checkpoint.read(self.codes)
        else:
            raw = checkpoint.read(self.codes, start, stop)
        values = _unpacked(raw, info.packing)
        if self.heads:
            pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
            return pairs.transpose(1, 2).reshape(values.shape)[start:stop]
        if self.row:
            return values.reshape(1, -1)[start:stop]
        return values

    def nbytes(self, checkpoint: Checkpoint, entry: bool = False) -> int:
        """Return the stored bytes of the weight, or of one of its rows."""
        info = checkpoint[self.codes]
        whole = info.nbytes if self.expert is None else info.row_bytes
        return whole // max(1, self.shape(checkpoint)[0]) if entry else whole


def _unpacked(raw: Tensor, packing: str) -> Tensor:
    """Return blocks of bytes [.., bytes of a row] as float32 values; plain numbers as they are."""
    if not packing:
        return raw.float()
    import gguf  # an extra, which the file's header has asked for

    kind = gguf.GGMLQuantizationType[packing]
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind).copy())


def _values(packing: str, row_bytes: int) -> int:
    """Return how many values lie in a row of so many bytes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[packing]]
    return row_bytes // size * block


def gguf_weights(
    tensors: Mapping[str, TensorInfo], folder: Path, file: Path, model_type: str, heads: tuple[int, int]
) -> PackedWeights:
    """Return the weights of a GGUF file by their names in the hub's layout. heads: of queries, of keys.

    Raises UserError for an architecture that is not read, or is not that of config.json.
    """
    arch = architecture(file)
    family = FAMILIES.get(arch)
    if family is None or model_type not in family.model_types:
        known = ", ".join(sorted(FAMILIES))
        what = f"is of the architecture {arch}" + ("" if family is None else f", and config.json says {model_type}")
        raise UserError(
            f"teacher {folder}: {file.name} {what}; MoE files that are read: {known}, each with its model's own config.json; "
            f"give the model's safetensors instead"
        )
    packed = PackedWeights()
    for name, info in tensors.items():
        for weight in _weights_of(name, info, family, heads):
            packed.weights[weight.key] = weight
            packed.parts.add(name)
    return packed


def _weights_of(name: str, info: TensorInfo, family: GgufFamily, heads: tuple[int, int]) -> list[PackedWeight]:
    """Return the weights that one tensor of the file holds: an expert each for a stack, none where it is not known."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return [GgufWeight(f"{_TOP[stem]}.{kind}", (name,))]
    match = _LAYER.fullmatch(name)
    if match is None:
        return []
    layer, part, kind = f"model.layers.{match[1]}", match[2], match[3]
    if stack := _EXPERTS.fullmatch(part):
        leaf = family.parts[("gate", "up", "down").index(stack[1])]
        place = f"{layer}.{family.block}.experts"
        return [GgufWeight(f"{place}.{e}.{leaf}.weight", (name,), expert=e) for e in range(info.shape[0])]
    if (part, kind) == _CORRECTION:
        return [GgufWeight(f"{layer}.{family.block}.e_score_correction_bias", (name,))]
    if part in _IN_BLOCK:
        return [
            GgufWeight(f"{layer}.{family.block}.{_IN_BLOCK[part]}.{kind}", (name,), row=part == "ffn_gate_inp_shexp")
        ]
    if part not in _IN_LAYER:
        return []
    rotary = {"attn_q": heads[0], "attn_k": heads[1]} if family.interleaved else {}
    return [GgufWeight(f"{layer}.{_IN_LAYER[part]}.{kind}", (name,), heads=rotary.get(part, 0))]
