"""Compare a model with its teacher on held-out text.

Blocks and a teacher, or its final hidden states, come in. Divergence, likelihood and agreement with intervals go out; so do
the scores of baselines, a judge's opinion, samples of writing, public tasks, and what became of each expert (`transfer`).
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "api": ["evaluate"],
        "bootstrap": ["Estimate"],
        "judge": ["Judge"],
        "reference": ["Reference"],
        "retention": ["gap_closed", "split_domains"],
        "scores": ["Scores"],
    },
)

if TYPE_CHECKING:
    from moe2dense.evaluation.api import evaluate as evaluate
    from moe2dense.evaluation.bootstrap import Estimate as Estimate
    from moe2dense.evaluation.judge import Judge as Judge
    from moe2dense.evaluation.reference import Reference as Reference
    from moe2dense.evaluation.retention import gap_closed as gap_closed
    from moe2dense.evaluation.retention import split_domains as split_domains
    from moe2dense.evaluation.scores import Scores as Scores
