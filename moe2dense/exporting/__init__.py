"""Checkpoints that serving stacks load: the transformers layout, GGUF, quantised weights.

In goes a student or any dense model of transformers; out comes a folder with a model card, checked against the student.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.exporting.api import Exported, export
    from moe2dense.exporting.hub import push_to_hub

__all__ = ["Exported", "export", "push_to_hub"]

__getattr__, __dir__, _ = lazy.attach(__name__, submod_attrs={"api": ["Exported", "export"], "hub": ["push_to_hub"]})
