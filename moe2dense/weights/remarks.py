"""Say what a reader should know of a folder of weights: files that are there and not read, or that lie elsewhere."""

from pathlib import Path

from moe2dense.common.files import outside_links
from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint, TensorInfo, read_header, same_values
from moe2dense.weights.files import SINGLE, read_index


def unread_files(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence where the folder has shards beside model.safetensors that hold something else, else nothing."""
    index = checkpoint.files.unread_index
    if index is None:
        return []
    where = f"{checkpoint.folder}: {SINGLE} is read, as transformers does"
    try:
        shards = _tensors_of(index)
    except UserError:
        return [f"{where}; {index.name} is a leftover, whose shards are missing or damaged: delete it"]
    names = sorted(shards.keys() ^ checkpoint.tensors.keys()) or sorted(
        name for name, info in checkpoint.tensors.items() if not same_values(info, shards[name])
    )
    if not names:
        return []
    return [
        f"{where}, but the shards of {index.name} beside it hold other weights ({len(names)} tensors differ, the first "
        f"is {names[0]}), and other programs may read those; delete the ones that are not meant"
    ]


def linked_files(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence where weights that are read are links to another folder, else nothing."""
    links = {path.name: path for path in outside_links(checkpoint.folder)}
    names = sorted(file.name for file in checkpoint.files.files if file.name in links)
    if not names:
        return []
    more = f" and {len(names) - 1} more are links" if len(names) > 1 else " is a link"
    return [f"{checkpoint.folder}: {names[0]}{more} to weights elsewhere ({links[names[0]].resolve()}), which are read"]


def _tensors_of(index: Path) -> dict[str, TensorInfo]:
    """Return the tensors that an index names. Raises UserError where one is missing."""
    weight_map = read_index(index)
    headers = {name: read_header(index.parent / name) for name in set(weight_map.values())}
    if any(tensor not in headers[name] for tensor, name in weight_map.items()):
        raise UserError(f"checkpoint index {index} names a tensor that is missing")
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
