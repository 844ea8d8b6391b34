"""What of the teacher is retained: the share of the gap to a control that is closed, and scores without what may be lost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moe2dense.errors import UserError
from moe2dense.evaluation.bootstrap import Estimate, ratio
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.summary import scores_of_table

# N blocks


def gap_closed(student: Scores, control: Scores, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the share of the gap between control and teacher that the student closes, 1 - KL(student) / KL(control), paired.

    {"overall": Estimate, leaving out the domains `without`, "by_domain": {domain: Estimate}}; 1 is the teacher, 0 the
    control, below 0 is worse than it. Raises UserError where the two were judged on different text.
    """
    a, b = student.token_table, control.token_table
    if not (np.array_equal(a.block, b.block) and np.array_equal(a.label, b.label)):
        raise UserError("control: judged on other text than the student; evaluate both on the same blocks")

    def share(mask: np.ndarray) -> Estimate:
        sums = np.stack([t.sums(np.where(mask, t.values["kl"], 0))[:, 0] for t in (a, b)], 1)
        return a.bootstrap.estimate(sums, lambda totals: 1 - ratio(totals))

    domains = np.array(a.domains, dtype=object)[a.block]
    return {
        "overall": share(~np.isin(domains, list(without))),
        "by_domain": {d: share(domains == d) for d in sorted(set(a.domains)) if (domains == d).any()},
    }


def split_domains(scores: Scores, domains: Sequence[str]) -> tuple[Scores, Scores] | None:
    """Return (scores of every other domain, scores of `domains`); None where either has no judged token.

    The same resamples and the same deciles of token frequency as in `scores`, so the three can be compared.
    """
    table = scores.token_table
    inside = np.isin(np.array(table.domains, dtype=object), list(domains))  # per block
    if inside[table.block].all() or not inside[table.block].any():
        return None
    return _of_blocks(scores, ~inside), _of_blocks(scores, inside)


def _of_blocks(scores: Scores, blocks: np.ndarray) -> Scores:
    """Return the scores over the blocks where `blocks` [N] is true."""
    outside = ~torch.from_numpy(blocks)[:, None]
    return scores_of_table(scores.token_table.of_blocks(blocks), scores.kl_NS.masked_fill(outside, float("nan")))
