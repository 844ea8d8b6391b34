"""Measure, expert by expert, how much of the teacher is in the student, on held-out tokens.

A teacher, a built student and blocks come in; for every expert of every layer its load, coverage, block error and token KL,
and their totals by layer and model, go out.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={"measure": ["Transfer", "measure_transfer"]})

if TYPE_CHECKING:
    from moe2dense.evaluation.transfer.measure import Transfer as Transfer
    from moe2dense.evaluation.transfer.measure import measure_transfer as measure_transfer
