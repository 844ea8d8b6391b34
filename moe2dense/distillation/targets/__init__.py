"""A teacher's distributions on a text, as training reads them: in memory, or stored in a folder.

A teacher and blocks come in; targets, which answer for any of the blocks, go out. A new format to store them in is one class of
formats.py and one row of registry.py.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.distillation.targets.memory import HiddenTargets, ResidentTargets, hidden_targets
    from moe2dense.distillation.targets.protocols import Targets
    from moe2dense.distillation.targets.registry import TARGET_FORMATS
    from moe2dense.distillation.targets.store import StoredTargets, open_targets
    from moe2dense.distillation.targets.write import write_targets

__all__ = [
    "TARGET_FORMATS",
    "HiddenTargets",
    "ResidentTargets",
    "StoredTargets",
    "Targets",
    "hidden_targets",
    "open_targets",
    "write_targets",
]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "memory": ["HiddenTargets", "ResidentTargets", "hidden_targets"],
        "protocols": ["Targets"],
        "registry": ["TARGET_FORMATS"],
        "store": ["StoredTargets", "open_targets"],
        "write": ["write_targets"],
    },
)
