"""Training regimes: small modules that change where the text, the targets or the models of a training run come from."""

from moe2dense.regimes.base import Regime

__all__ = ["Regime"]
