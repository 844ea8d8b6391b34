"""The numbers of every judged token with its block, position and label, and their sums by block and group."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moe2dense.evaluation.bootstrap import Bootstrap, Estimate

# N blocks, n judged tokens, G groups


@dataclass
class TokenTable:
    """The judged tokens: values by name [n], and for each its block, position, label and decile.

    decile: tenth of token frequency, 0 = rarest. domains: one label per block.
    """

    values: dict[str, np.ndarray]
    block: np.ndarray
    position: np.ndarray
    label: np.ndarray
    decile: np.ndarray
    domains: list[str]
    bootstrap: Bootstrap

    def sums(self, name: str | np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
        """Return, per block and group [N, G], the sum of a column (or of the given values), in float64."""
        values = self.values[name] if isinstance(name, str) else name
        index = self.block * groups + (0 if group is None else group)
        n = self.bootstrap.blocks
        return np.bincount(index, values.astype(np.float64), minlength=n * groups).reshape(n, groups)

    def mean(self, name: str) -> Estimate:
        """Return the mean of a column over all judged tokens."""
        return self.bootstrap.mean(self.sums(name)[:, 0], self.sums(np.ones(len(self.block)))[:, 0])

    def of_blocks(self, blocks: np.ndarray) -> "TokenTable":
        """Return the tokens of the blocks where `blocks` [N] is true, with the same resamples and deciles."""
        keep = blocks[self.block]
        return TokenTable(
            {k: v[keep] for k, v in self.values.items()},
            self.block[keep],
            self.position[keep],
            self.label[keep],
            self.decile[keep],
            self.domains,
            self.bootstrap,
        )


def frequency_groups(label: np.ndarray, token_counts: Tensor | None = None, groups: int = 10) -> np.ndarray:
    """Return each judged token's decile of token frequency [n], 0 = rarest; the same id always falls in the same group.

    Ids are ordered by their count (then id) and cut so that the groups have about equally many judged tokens. Where a
    few ids are very frequent some groups stay empty.
    """
    size = int(label.max()) + 1
    here = np.bincount(label, minlength=size)
    counts = here if token_counts is None else np.asarray(token_counts)[:size]
    order = np.lexsort((np.arange(size), counts))
    mass = here[order].astype(np.float64)
    middle = np.cumsum(mass) - mass / 2
    group = np.empty(size, dtype=np.int64)
    group[order] = np.minimum(groups - 1, (middle / mass.sum() * groups).astype(np.int64))
    return group[label]
