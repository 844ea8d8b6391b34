"""Download a model from the hub: its weights once, in the form that is read here, and the small files beside them."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from moe2dense.common.hub import hub_unreachable

_INDEX = "model.safetensors.index.json"
_SMALL_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")


def weight_files(hub_id: str) -> list[str]:
    """Return the weight files of a model on the hub: those that its index names, or the only one.

    Other copies of the weights, such as `original/` or consolidated.safetensors, are not among them.
    """
    try:
        index = Path(hf_hub_download(hub_id, _INDEX, local_files_only=bool(hub_unreachable())))
    except LocalEntryNotFoundError:  # not in the cache, and no network to ask whether there is one
        raise
    except EntryNotFoundError:
        return ["model.safetensors"]
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
