"""Stream records of a dataset on the hub; only what is read is downloaded."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
from huggingface_hub import constants, dataset_info

from moe2dense.common.hub import hub_unreachable
from moe2dense.data.fields import FIELDS
from moe2dense.data.files import SPLIT_NAMES
from moe2dense.data.readers import without_nulls
from moe2dense.errors import UserError, first_line

_SHUFFLE_BUFFER = 2000  # records of a streamed dataset among which the order is drawn


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off within the context."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def hub_split(split: str, available: list[str]) -> tuple[str, bool]:
    """Return the hub's name of a split ("" for none), and whether records are chosen from it by hash.

    Many data sets have no split to choose by: a part of `train` that a hash decides is held out of it then.
    """
    own = next((n for n in SPLIT_NAMES[split] if n in available), "")
    held_out = any(n in available for n in SPLIT_NAMES["valid"])
    if split == "train":
        return own, bool(own) and not held_out
    if own or (split == "ood" and available != ["train"]):
        return own, False
    return ("train", True) if "train" in available and not held_out else ("", False)


def hub_revision(name: str) -> str:
    """Return the name of a dataset with its present revision; the name alone where the hub cannot be asked."""
    repository = name.partition(":")[0]
    try:
        return name if constants.HF_HUB_OFFLINE else f"{name}@{dataset_info(repository, timeout=10).sha}"
    except Exception:  # no network, no such dataset, gated, ...: reading it says so
        return name


def hub_records(name: str, split: str, seed: int, remedy: str) -> tuple[Iterable[dict[str, Any]], bool]:
    """Return a streamed hub dataset, `owner/name` or `owner/name:configuration`, and whether it must be split by hash.

    Raises UserError where it cannot be reached, or has no such split; remedy: what else can be passed.
    """
    if reason := hub_unreachable():
        raise UserError(f"data {name!r} is no file or folder here, and the hub cannot be reached ({reason}); {remedy}")
    repository, _, configuration = name.partition(":")
    with _without_bars():
        try:
            if not constants.HF_HUB_OFFLINE:
                dataset_info(repository, timeout=10)  # fails at once where `datasets` would retry for half a minute
            available = datasets.get_dataset_split_names(repository, configuration or None)
            wanted, hashed = hub_split(split, available)
            data = None
            if wanted:
                data = datasets.load_dataset(repository, configuration or None, split=wanted, streaming=True)
        except Exception as error:  # no network, offline mode, no such dataset, gated, ...: one remedy for all
            raise UserError(
                f"data {name!r} is no file or folder here and cannot be read from the hub "
                f"({first_line(error)}); {remedy}"
            ) from error
    if data is None:
        raise UserError(
            f"hub dataset {name!r} has no {split} split (found {', '.join(available)}); pass a file instead"
        )
    columns = [c for c in data.column_names or () if c in FIELDS]
    if columns:
        data = data.select_columns(columns)
    return map(without_nulls, data.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)), hashed
