"""Checkpoints that serving stacks load: the transformers layout, GGUF, quantised weights."""

from moe2dense.exporting.api import Exported, export

__all__ = ["Exported", "export"]
