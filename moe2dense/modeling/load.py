"""Load a transformers model whole: every tensor of the checkpoint is used, every parameter is there, or it is refused by name."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moe2dense.common.counters import count_disk
from moe2dense.errors import UserError, first_line
from moe2dense.weights.files import GGUF_SUFFIX, weight_files
from moe2dense.weights.finite import refuse_not_finite

_NAMED = 3  # tensors that an error names
# what a wrapper puts before the names of a model's tensors = what the wrapper is, and how to save what is inside
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "save the model that was compiled (model._orig_mod)"),
    "module.": ("DistributedDataParallel", "save the model inside it (model.module)"),
    "base_model.model.": ("peft", "merge the adapter and save the model inside it (model.merge_and_unload())"),
    "_fsdp_wrapped_module.": ("FSDP", "save the model inside it"),
    "_forward_module.": ("Lightning or DeepSpeed", "save the model inside it"),
}
_FAULTS = {
    "missing_keys": "not in the checkpoint, so transformers would start {them} at random",
    "unexpected_keys": "in the checkpoint but not part of the architecture that config.json names",
    "mismatched_keys": "of another shape than config.json says",
    "error_msgs": "impossible to load",
    "conversion_errors": "impossible to convert",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch transformers' own progress bars and reports off within the context."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(
    source: str | Path, argument: str = "", dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal language model with transformers from a folder or hub id; no parameter is left at random.

    argument: what the user gave it as, such as "--to"; it opens every error. dtype: torch's default, float32, where None is given.
    options: more for `from_pretrained`.
    Raises UserError naming up to three tensors that are missing, left over or of another shape, the first that holds NaN or
    infinity, and for a folder whose weights transformers would not read as they are (`moe2dense.weights.files`).
    """
    name = f"{argument} {source}".strip()
    files = weight_files(source).files if Path(source).is_dir() else []
    if files and files[0].suffix == GGUF_SUFFIX:
        raise UserError(f"{name} holds GGUF weights, which are read of teachers alone; give a folder with safetensors")
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or torch.get_default_dtype(),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
    except Exception as error:  # each architecture fails in its own way on a config or weights that do not fit it
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error
    model, info = loaded
    count_disk(sum(file.stat().st_size for file in files))
    if faults := loading_faults(info):
        raise UserError(f"{name} cannot be used: {faults}")
    for tensor, value in model.state_dict().items():
        refuse_not_finite(
            value, f"{name} cannot be used: tensor {tensor!r}", "give a checkpoint from before that happened"
        )
    return model


def loading_faults(info: dict[str, Any]) -> str:
    """Return what is wrong with a model that `from_pretrained` loaded, by its loading info; '' where all tensors fit."""
    missing, unexpected = (_names(info.get(kind) or ()) for kind in ("missing_keys", "unexpected_keys"))
    if hint := wrapper_hint(unexpected, missing):
        return hint
    for kind, text in _FAULTS.items():
        names = _names(info.get(kind) or ())
        if len(names) == 1:
            return f"tensor {names[0]} is {text.format(them='it')}"
        if names:
            return f"{len(names)} tensors are {text.format(them='them')}: {some(names)}"
    return ""


def wrapper_hint(unknown: Iterable[str], wanted: Iterable[str]) -> str:
    """Return a sentence where unknown tensors are the wanted ones under the names that a wrapper gives them, else ''."""
    needed = set(wanted)
    for name in unknown:
        for prefix, (wrapper, remedy) in _WRAPPERS.items():
            if prefix in name and name.replace(prefix, "") in needed:
                return f"its tensors bear the names that {wrapper} gives them ({name}, for {name.replace(prefix, '')}); {remedy}"
    return ""


def some(names: list[str]) -> str:
    """Return the first names of a list, as an error shows them."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _names(entries: Iterable[Any]) -> list[str]:
    """Return the names in one list of transformers' loading info, sorted; an entry may be (name, shape, shape)."""
    return sorted(str(e[0]) if isinstance(e, tuple) else str(e) for e in entries)
