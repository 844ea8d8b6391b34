"""KL to the teacher at the tokens that are routed to each expert."""

from typing import Any

from torch import Tensor

from moe2dense.evaluation.transfer.setup import TransferSetup

# T tokens, N blocks, E experts


def expert_kl(setup: TransferSetup, chosen: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (mean KL by expert, ends of the trained student's interval over blocks); chosen [T, E] is 1 where routed."""
    means: dict[str, Any] = {}
    interval: dict[str, Any] = {}
    n, experts = len(setup.blocks), chosen.shape[1]
    for name, kl in setup.kl.items():
        judged = (~kl.isnan()).float()
        total = (chosen * kl.nan_to_num(0)[:, None]).view(n, -1, experts).sum(1).double().numpy()
        count = (chosen * judged[:, None]).view(n, -1, experts).sum(1).double().numpy()
        estimates = [setup.bootstrap.mean(total[:, e], count[:, e]) for e in range(experts)]
        means[f"kl_{name}"] = [float(x) for x in estimates]
        if name == "after":
            interval = {"kl_low": [x.low for x in estimates], "kl_high": [x.high for x in estimates]}
    return means, interval
