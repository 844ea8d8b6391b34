"""Train a student on its teacher: one loop, resumable, over stored, streamed or resident targets.

A student, blocks and targets (or a teacher) come in; the trained student, its metrics and checkpoints go out. Regimes
change the text, the targets or the models of the loop.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.distillation.api import TrainResult, distill
    from moe2dense.distillation.regime import Regime, RunView

__all__ = ["Regime", "RunView", "TrainResult", "distill"]

__getattr__, __dir__, _ = lazy.attach(
    __name__, submod_attrs={"api": ["TrainResult", "distill"], "regime": ["Regime", "RunView"]}
)
