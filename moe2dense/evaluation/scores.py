"""How close a student is to its teacher on held-out text: distributions, likelihood, calibration, each with an interval.

The teacher is run once (`reference`) and every student is judged against its final hidden states, so teacher and student
need never share memory and [tokens, vocabulary] never exists in full.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from moe2dense.evaluation.bootstrap import Estimate
from moe2dense.evaluation.token_table import TokenTable

# N blocks, S block length


@dataclass
class Scores:
    """The result of `evaluate`. KL and entropies are in nats per token; an Estimate has a 95% interval over clusters.

    clusters, unit: how many of what are resampled ("31", "passages").

    kl KL(teacher || student); agreement: both have the same first choice; top5: the teacher's first choice is among the
    student's five; acceptance: chance that the teacher accepts a token that the student drew, in speculative decoding; correlation: Pearson, over tokens, of the probabilities both give the true next token; ece: expected
    calibration error of the first choice against the text (15 equal bins, Guo et al. 2017); entropy_gap: student minus
    teacher; rare_kl: KL on the tenth of the tokens that is rarest by count in the text `rare_by` names; by_decile: rarest
    tenth of the tokens first; kl_NS: KL at every position [N, S], NaN where not judged.
    """

    kl: Estimate
    nll: Estimate
    teacher_nll: Estimate
    perplexity: Estimate
    teacher_perplexity: Estimate
    agreement: Estimate
    top5: Estimate
    acceptance: Estimate
    correlation: Estimate
    ece: Estimate
    teacher_ece: Estimate
    entropy: Estimate
    entropy_gap: Estimate
    rare_kl: Estimate
    by_domain: dict[str, dict[str, Any]] = field(repr=False)
    by_decile: list[dict[str, Any]] = field(repr=False)
    by_position: list[dict[str, Any]] = field(repr=False)
    worst_tokens: list[dict[str, Any]] = field(repr=False)
    tokens: int
    blocks: int
    clusters: int
    unit: str
    rare_by: str
    kl_NS: Tensor = field(repr=False)
    token_table: TokenTable = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        skip = {"kl_NS", "token_table"}
        return {k: _plain(v) for k, v in self.__dict__.items() if k not in skip}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, np.floating) else value
