"""Training regimes: small modules that change where the text, the targets or the models of a training run come from."""

from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.registry import make_regime

__all__ = ["Regime", "make_regime"]
