"""The teacher's distributions on a text: in memory or stored on disk."""

from moe2dense.targets.memory import HiddenTargets, ResidentTargets, Targets, as_targets, hidden_targets

__all__ = ["HiddenTargets", "ResidentTargets", "Targets", "as_targets", "hidden_targets"]
