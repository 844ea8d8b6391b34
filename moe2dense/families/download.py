"""Download a model from the hub: its weights once, in the form that is read here, and the small files beside them."""

import json
from pathlib import Path

from huggingface_hub import constants, file_exists, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from moe2dense.common.hub import hub_unreachable

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")


def is_on_hub(hub_id: str, name: str) -> bool:
    """Return whether a model's repository has a file; where the hub cannot be asked, whether the cache has it."""
    if constants.HF_HUB_OFFLINE or hub_unreachable():
        return isinstance(try_to_load_from_cache(hub_id, name), str)
    return file_exists(hub_id, name)


def weight_files(hub_id: str) -> list[str]:
    """Return the weight files of a model on the hub: the single one where there is one, as transformers takes it, else the index's.

    Other copies of the weights, such as `original/` or consolidated.safetensors, are not among them.
    """
    if is_on_hub(hub_id, _SINGLE):
        return [_SINGLE]
    try:
        index = Path(hf_hub_download(hub_id, _INDEX, local_files_only=bool(hub_unreachable())))
    except LocalEntryNotFoundError:  # not in the cache, and no network to ask whether there is one
        raise
    except EntryNotFoundError:
        return [_SINGLE]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def download_model(hub_id: str) -> Path:
    """Download a model into the hub cache, unless it is there; return its folder.

    Raises what the hub client raises: many kinds of errors, all of which mean that the files are not to be had.
    """
    weights = weight_files(hub_id)
    elsewhere = any("/" in name for name in weights)
    return Path(
        snapshot_download(
            hub_id,
            allow_patterns=[*_SMALL_FILES, *weights],
            ignore_patterns=None if elsewhere else ["*/*"],
            local_files_only=bool(hub_unreachable()),
        )
    )
