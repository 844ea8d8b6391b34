"""The numbers of every judged token with its block, cluster, position and label, and their sums by cluster and group."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from moe2dense.evaluation.bootstrap import Bootstrap, Estimate

# N blocks, C clusters, n judged tokens, G groups


@dataclass
class TokenTable:
    """The judged tokens: values by name [n], and for each its block, cluster, position, label and decile.

    cluster: what is resampled for intervals. decile: tenth of token frequency, 0 = rarest. domains: one label per block.
    unit: what a cluster is ("passages"). counted_in: the text whose token counts make the deciles.
    """

    values: dict[str, np.ndarray]
    block: np.ndarray
    cluster: np.ndarray
    position: np.ndarray
    label: np.ndarray
    decile: np.ndarray
    domains: list[str]
    bootstrap: Bootstrap
    unit: str
    counted_in: str

    def sums(self, name: str | np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
        """Return, per cluster and group [C, G], the sum of a column (or of the given values), in float64."""
        values = self.values[name] if isinstance(name, str) else name
        index = self.cluster * groups + (0 if group is None else group)
        n = self.bootstrap.clusters
        return np.bincount(index, values.astype(np.float64), minlength=n * groups).reshape(n, groups)

    def mean(self, name: str) -> Estimate:
        """Return the mean of a column over all judged tokens."""
        return self.bootstrap.mean(self.sums(name)[:, 0], self.sums(np.ones(len(self.block)))[:, 0])

    def of_blocks(self, blocks: np.ndarray) -> "TokenTable":
        """Return the tokens of the blocks where `blocks` [N] is true, with the same resamples and deciles."""
        keep = blocks[self.block]
        columns = {name: getattr(self, name)[keep] for name in ("block", "cluster", "position", "label", "decile")}
        return dataclasses.replace(self, values={k: v[keep] for k, v in self.values.items()}, **columns)
