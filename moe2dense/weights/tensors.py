"""Read small safetensors files whole; one that cannot be read is said in one sentence."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe2dense.errors import UserError, first_line


def read_tensors(file: str | Path, remedy: str) -> dict[str, Tensor]:
    """Read every tensor of a file by name. Raises UserError naming the file and, at its end, the remedy."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; {remedy}") from error
