"""Write a student as a standard transformers folder: weights, config, tokenizer, generation defaults; then check it."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.common.units import parse_bytes
from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.errors import UserError
from moe2dense.exporting import tokenizer as tokenizers
from moe2dense.exporting import verify
from moe2dense.exporting.dialects import older_fields
from moe2dense.modeling.internals import hub_names
from moe2dense.modeling.load import quiet

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TokenizerSource = str | Path | PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checked:
    """What the check after writing compared."""

    # compared bit for bit with the student rounded to the stored dtype
    tensors: int
    # the largest, of the reloaded model against the student's module on the same weights
    logit_difference: float


def torch_dtype(name: str) -> torch.dtype:
    """Return torch.bfloat16 for `bfloat16`. Raises UserError for a dtype that is not one of DTYPES."""
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the model's tensors in `dtype`; tied tensors stay one. Raises UserError naming a tensor that is not finite."""
    by_storage: dict[tuple, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in by_storage:
            by_storage[key] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            if not torch.isfinite(by_storage[key]).all():
                raise UserError(f"export: tensor {name} has values that are not finite in {dtype}")
        state[name] = by_storage[key]
    return state


def write_model(
    model: PreTrainedModel,
    folder: Path,
    source: TokenizerSource | None = None,
    dtype: str = "bfloat16",
    shard_size: str | int = "5GB",
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write `model` into the existing `folder` in the standard layout, with the tokenizer of `source` if given.

    Weights are rounded to `dtype`, split into shards of at most `shard_size` with an index, tied weights stored once.
    generation_config.json and the license files come from `source` when it is a folder that has them. `state` replaces
    the model's own tensors, stored as they are.
    """
    origin = tokenizers.source_folder(source) if source is not None else None
    tokenizer = tokenizers.load_tokenizer(source) if source is not None else None
    _check_vocabulary(model, tokenizer)
    config = model.config
    model.config = copy.deepcopy(config)  # save_pretrained writes into the config it saves
    try:
        state = cast_state(model, torch_dtype(dtype)) if state is None else state
        with quiet(), hub_names(model):
            model.save_pretrained(folder, state_dict=state, max_shard_size=parse_bytes(shard_size, "shard_size"))
    finally:
        model.config = config
    edit_json(folder / "config.json", dtype=dtype)
    edit_json(folder / "config.json", **older_fields(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    if source is not None and tokenizer is not None:
        tokenizers.write_tokenizer(source, tokenizer, folder)
    if origin is not None:
        tokenizers.copy_files(origin, folder, tokenizers.LEGAL_FILES)
        defaults = tokenizers.generation_defaults(origin)
        if defaults is not None:
            (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")


def check_model(
    model: PreTrainedModel,
    folder: Path,
    source: TokenizerSource | None = None,
    dtype: str = "bfloat16",
    moe_shaped: bool = False,
) -> Checked:
    """Reload `folder` with transformers alone and compare it with `model`. Raises VerificationError naming the tensor."""
    verify.check_config(folder, model, dtype)
    verify.check_dense(folder, moe_shaped)
    if source is not None:
        verify.check_tokenizer(folder, tokenizers.load_tokenizer(source))
    loaded = verify.load_plain(folder, model.device)
    tensors = verify.compare_tensors(loaded, model, torch_dtype(dtype))
    return Checked(tensors, verify.compare_forward(loaded, model))


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if tokenizer is not None:
        check_vocabulary(tokenizer, rows, "tokenizer: it")


def edit_json(path: Path, **values: Any) -> None:
    """Set top-level fields of a JSON file."""
    table = json.loads(path.read_text(encoding="utf-8"))
    table.update(values)
    table.pop("_name_or_path", None)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
