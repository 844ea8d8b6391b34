"""KL to the teacher at the tokens that are routed to each expert."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2dense.evaluation.transfer.setup import TransferSetup

# T tokens, C clusters, E experts


def expert_kl(setup: TransferSetup, chosen: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (mean KL by expert, ends of the trained student's interval over works or passages); chosen [T, E] is 1 where routed."""
    means: dict[str, Any] = {}
    interval: dict[str, Any] = {}
    experts = chosen.shape[1]

    def by_cluster(values: Tensor) -> np.ndarray:
        """Return the sums [C, E] of values [T, E]."""
        zeros = torch.zeros(setup.bootstrap.clusters, experts, dtype=torch.float64)
        return zeros.index_add_(0, setup.cluster, values.double()).numpy()

    for name, kl in setup.kl.items():
        total = by_cluster(chosen * kl.nan_to_num(0)[:, None])
        count = by_cluster(chosen * (~kl.isnan()).float()[:, None])
        estimates = [setup.bootstrap.mean(total[:, e], count[:, e]) for e in range(experts)]
        means[f"kl_{name}"] = [float(x) for x in estimates]
        if name == "after":
            interval = {"kl_low": [x.low for x in estimates], "kl_high": [x.high for x in estimates]}
    return means, interval
