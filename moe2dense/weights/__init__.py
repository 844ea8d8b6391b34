"""Read safetensors checkpoints tensor by tensor, packed or not, and identify them by a fingerprint.

A folder comes in; tensors, or slices of them, go out. Nothing is loaded that is not asked for.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.weights.checkpoint import Checkpoint
    from moe2dense.weights.fingerprint import checkpoint_fingerprint

__all__ = ["Checkpoint", "checkpoint_fingerprint"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={"checkpoint": ["Checkpoint"], "fingerprint": ["checkpoint_fingerprint"]},
)
