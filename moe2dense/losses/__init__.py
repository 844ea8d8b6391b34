"""Losses that teach a student: divergences of next-token distributions, and losses between hidden layers.

In go the student's hidden states or logits and what is known of the teacher at the same tokens; out come values and
gradients. The matrix of tokens times vocabulary is never in memory as a whole.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.losses.distillation import Loss, distillation_loss
    from moe2dense.losses.feature_match import FeatureMatch
    from moe2dense.losses.registry import DIVERGENCES, FEATURE_KINDS, LAYER_MAPS

__all__ = ["DIVERGENCES", "FEATURE_KINDS", "LAYER_MAPS", "FeatureMatch", "Loss", "distillation_loss"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "distillation": ["Loss", "distillation_loss"],
        "feature_match": ["FeatureMatch"],
        "registry": ["DIVERGENCES", "FEATURE_KINDS", "LAYER_MAPS"],
    },
)
