"""Which domains an expert's tokens come from, compared with chance."""

import numpy as np

# N blocks, E experts, D domains


def domain_lift(
    counts_NE: np.ndarray,
    domains: list[str],
    shuffles: int = 200,
    seed: int = 0,
    units_N: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Compare the domains that an expert's tokens come from with chance.

    counts_NE: tokens of each block routed to each expert; domains: one label per block. Returns "names", "share_ED" (of the
    expert's tokens), "overall_D" (of all routed tokens), "lift_E" (largest share / overall, of the expert's favourite
    domain), and "chance_E": the 95th percentile of that when labels are shuffled among works or passages: units_N gives
    each block's, by default every block is its own.
    """
    names = sorted(set(domains))
    index = np.array([names.index(d) for d in domains])
    overall = _onehot(index, len(names)).T @ counts_NE.sum(1, keepdims=True)
    overall = overall[:, 0] / max(overall.sum(), 1)

    def shares(labels: np.ndarray) -> np.ndarray:
        per = counts_NE.T @ _onehot(labels, len(names))
        return per / np.maximum(per.sum(1, keepdims=True), 1)

    def top(share: np.ndarray, base: np.ndarray) -> np.ndarray:
        return (share / np.maximum(base, 1e-12)).max(1)

    rng = np.random.default_rng(seed)
    total = counts_NE.sum(1)
    chance = []
    units = np.arange(len(index)) if units_N is None else np.unique(units_N, return_inverse=True)[1]
    unit_labels = np.array([np.bincount(index[units == u]).argmax() for u in range(units.max() + 1)])
    for _ in range(shuffles if len(names) > 1 else 0):
        labels = rng.permutation(unit_labels)[units]
        base = np.bincount(labels, total, len(names)) / max(total.sum(), 1)
        chance.append(top(shares(labels), base))
    share = shares(index)
    used = counts_NE.sum(0) > 0
    return {
        "names": np.array(names, dtype=object),
        "share_ED": share,
        "overall_D": overall,
        "lift_E": np.where(used, top(share, overall), np.nan),
        "chance_E": np.quantile(chance, 0.95, axis=0) if chance else np.ones(counts_NE.shape[1]),
    }


def _onehot(index: np.ndarray, size: int) -> np.ndarray:
    return np.eye(size)[index]
