"""Text written by a teacher or a student, for training or to look at.

A model and prompts come in; completions, or a folder of records that `--data` reads, go out. `generate` streams a teacher,
`write_text` makes a dataset of it, and endpoint.py asks a server.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.generation.dataset import write_text
    from moe2dense.generation.sampling import Sampling
    from moe2dense.generation.streamed import Completion, generate

__all__ = ["Completion", "Sampling", "generate", "write_text"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={"dataset": ["write_text"], "sampling": ["Sampling"], "streamed": ["Completion", "generate"]},
)
