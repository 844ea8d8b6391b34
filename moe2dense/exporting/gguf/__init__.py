"""GGUF files for llama.cpp.

In goes a dense model and its tokenizer; out comes one file, read back and compared.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.exporting.gguf.write import write_gguf

__all__ = ["write_gguf"]

__getattr__, __dir__, _ = lazy.attach(__name__, submod_attrs={"write": ["write_gguf"]})
