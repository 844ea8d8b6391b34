"""What a teacher is before it runs: its config and card, the empty transformers model, and its parameters on disk.

Layers, memory plans, expert backends, streams and observers need no more than this.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moe2dense.common.counters import count_move
from moe2dense.common.devices import pick_device
from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard
from moe2dense.modeling import internals
from moe2dense.modeling.head import logit_rules
from moe2dense.teacher.lm_head import LMHead
from moe2dense.teacher.parameters import Weights, assign
from moe2dense.weights.checkpoint import Checkpoint, same_values
from moe2dense.weights.files import GGUF_SUFFIX
from moe2dense.weights.formats.find import PackedWeights, find_packed
from moe2dense.weights.formats.gguf import gguf_weights
from moe2dense.weights.remarks import linked_files, unread_files

_TABLE_ROWS = 4096  # rows of an embedding table read at once
_NAMED = 3  # ignored tensors that are named


class Skeleton:
    """A causal language model without weights, and the checkpoint that holds them.

    `card` is None for a dense model, whose layers stream all the same. `ignored` names checkpoint tensors the model has no place for;
    `remarks` are sentences on what the checkpoint holds and is not used. `config` is corrected where it ties tensors that differ.
    """

    def __init__(self, path: Path, config: PreTrainedConfig, card: TeacherCard | None, device: str, quantize: str = ""):
        self.path, self.config, self.card, self.quantize = path, config, card, quantize
        self.device = pick_device(device)
        self.dtype = compute_dtype(self.device)
        text = config.get_text_config()
        self.model = internals.build_skeleton(text, self.dtype)
        self.checkpoint = Checkpoint(path)
        stored_as = _stored_model_type(path)
        multimodal = stored_as not in ("", text.model_type)
        prefix = _language_prefix(self.checkpoint) if multimodal else ""
        packed = _packed_weights(self.checkpoint, config)
        names = packed.names(self.checkpoint.tensors)
        key_map = internals.map_keys(self.model, names, prefix, stored_as if multimodal else "")
        self.ignored = key_map.ignored
        self.remarks = [
            *unread_files(self.checkpoint),
            *linked_files(self.checkpoint),
            *_untie(text, key_map, self.checkpoint),
            *_ignored_tensors(path, key_map.ignored),
            *_unrounded_activations(path, packed),
        ]
        self.weights = Weights(self.checkpoint, key_map, self.model, packed)
        name, self.body = internals.decoder(self.model)
        self.layers_prefix = f"{name}.layers." if name else "layers."
        self.embedding_name = f"{name}.embed_tokens.weight" if name else "embed_tokens.weight"
        self.hidden_size = int(text.hidden_size)

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Return parameters and saved buffers by name, without contents."""
        return internals.saved_tensors(self.model)

    def tensor(self, name: str) -> Tensor:
        """Read any parameter or saved buffer by its transformers name, in the compute dtype. Raises UserError for other names."""
        if name not in self.shapes:
            raise UserError(f"teacher {self.path}: the model has no parameter {name!r}")
        return self.converted(name)

    def converted(self, name: str) -> Tensor:
        """Read a parameter as the model keeps it: its dtype, on the device that computes. Raises UserError for another shape."""
        value, want = self.weights.parameter(name), self.shapes[name]
        if value.shape != want.shape:
            raise UserError(
                f"checkpoint {self.path}: tensor for parameter {name!r} has shape {list(value.shape)}, "
                f"the config says {list(want.shape)}"
            )
        count_move(value, self.device)
        return value.to(self.device, want.dtype)

    def read_head(self) -> LMHead:
        """Read the language-model head from disk. Its weight stays in the stored dtype."""
        bias = self.converted("lm_head.bias") if "lm_head.bias" in self.shapes else None
        scale, softcap = logit_rules(self.model.config.get_text_config())
        stored = self.weights.parameter("lm_head.weight").to(self.device)
        return LMHead(stored, bias, scale, softcap, self.dtype)

    def embeddings(self, ids: Tensor, chunks: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the embedded ids [n, S, H] of each chunk of blocks; of the table only the rows in use are in memory."""
        used, index = torch.unique(ids, return_inverse=True)
        vocabulary = self.shapes[self.embedding_name].shape[0]
        if len(used) and (used[0] < 0 or used[-1] >= vocabulary):
            raise UserError(
                f"input_ids must lie in [0, {vocabulary}), the teacher's vocabulary; found {int(used[0])} to {int(used[-1])}"
            )
        table = torch.empty(len(used), self.hidden_size, dtype=self.dtype)
        for a in range(0, vocabulary, _TABLE_ROWS):
            lo, hi = (int(torch.searchsorted(used, v)) for v in (a, a + _TABLE_ROWS))
            if lo < hi:
                first, last = int(used[lo]), int(used[hi - 1])
                part = self.weights.rows(self.embedding_name, first, last + 1)
                table[lo:hi] = part[used[lo:hi] - first].to(self.dtype)
        count_move(table, self.device)
        table = table.to(self.device)
        for rows in chunks:
            yield internals.embed(self.body, table, index[rows].to(self.device))

    def load_rest(self) -> None:
        """Read norms and whatever else lies outside layers, embedding and head; it stays in memory."""
        for name, value in internals.saved_tensors(self.model).items():
            if not name.startswith((self.layers_prefix, "lm_head.")) and name != self.embedding_name and value.is_meta:
                assign(self.model, name, self.converted(name))
        internals.move_unsaved_buffers(self.model, self.device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that a teacher is computed in: bfloat16 on a GPU, torch's default (float32) on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.get_default_dtype()


def _packed_weights(checkpoint: Checkpoint, config: PreTrainedConfig) -> PackedWeights:
    """Return the packed weights of a checkpoint. Raises UserError for those that cannot be told how to unpack."""
    file, text = checkpoint.files.files[0], config.get_text_config()
    if file.suffix != GGUF_SUFFIX:
        return find_packed(checkpoint.tensors, quantization_of(config))
    heads = text.num_attention_heads, text.num_key_value_heads
    return gguf_weights(checkpoint.tensors, checkpoint.folder, file, text.model_type, heads)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return what config.json says of quantised weights, for the whole model or for its language model alone."""
    own = getattr(config, "quantization_config", None)
    return own or getattr(config.get_text_config(), "quantization_config", None)


def _untie(config: PreTrainedConfig, key_map: internals.KeyMap, checkpoint: Checkpoint) -> list[str]:
    """Correct a config that ties tensors which the checkpoint holds with different values; return a sentence on each.

    transformers does not tie those either.
    """
    remarks = []
    for name, twin in key_map.tied.items():
        (first,), (second,) = key_map.sources[name], key_map.sources[twin]
        plain = first.key in checkpoint.tensors and second.key in checkpoint.tensors
        if plain and same_values(checkpoint[first.key], checkpoint[second.key]):
            continue
        config.tie_word_embeddings = False
        remarks.append(
            f"{checkpoint.folder}: config.json ties {name} to {twin} (tie_word_embeddings), but the checkpoint holds both with "
            f"different values; they are not tied, as in transformers"
        )
    return remarks


def _ignored_tensors(path: Path, ignored: Sequence[str]) -> list[str]:
    """Return a sentence on the tensors that the model has no place for, else nothing."""
    if not ignored:
        return []
    names = ", ".join(ignored[:_NAMED]) + (", ..." if len(ignored) > _NAMED else "")
    return [f"{path}: {len(ignored)} tensors are ignored, which the model has no place for: {names}"]


def _unrounded_activations(path: Path, packed: PackedWeights) -> list[str]:
    """Return a sentence on the scales of activations that are not used, else nothing."""
    if not packed.activations:
        return []
    return [
        f"{path}: {len(packed.activations)} scales of activations are not used ({packed.activations[0]}, ...): weights are unpacked, "
        f"and activations are not rounded"
    ]


def _stored_model_type(path: Path) -> str:
    """Return the model_type in a folder's config.json, as it stands there; '' where it cannot be read."""
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def _language_prefix(checkpoint: Checkpoint) -> str:
    """Return what precedes the names of the language model's tensors in a multimodal checkpoint."""
    for prefix in ("language_model.", "model.language_model."):
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return prefix
    return ""
