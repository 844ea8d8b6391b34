"""The teacher's distributions on a text: in memory or stored on disk."""

from moe2dense.distillation.targets.memory import HiddenTargets, ResidentTargets, Targets, as_targets, hidden_targets
from moe2dense.distillation.targets.store import StoredTargets, open_targets, write_targets

__all__ = [
    "HiddenTargets",
    "ResidentTargets",
    "StoredTargets",
    "Targets",
    "as_targets",
    "hidden_targets",
    "open_targets",
    "write_targets",
]
