"""The `gguf` package, which is optional."""

from typing import Any

from moe2dense.errors import UserError


def package() -> Any:
    """Return the `gguf` package. Raises UserError saying how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("format: gguf needs the gguf package; pip install 'moe2dense[gguf]'") from error
    return gguf
