"""Training regimes: small modules that change where the text, the targets or the models of a training run come from."""

from moe2dense.regimes.base import Regime
from moe2dense.regimes.choose import make_regime

__all__ = ["Regime", "make_regime"]
