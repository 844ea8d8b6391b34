"""The units that are resampled for intervals: works or passages of the text, whose tokens depend on one another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks

# N blocks, S block length


@dataclass(frozen=True)
class Clusters:
    """What a text is resampled by: unit ("works", "passages" or "blocks"), count, and each token's cluster [N, S]."""

    unit: str
    count: int
    index: Tensor


def clusters_of(blocks: Blocks) -> Clusters:
    """Return the largest known units of a text that there are several of: works, else passages, else blocks.

    Tokens of one work resemble one another more than those of two do, so blocks cut from it are no independent draws.
    """
    for unit, numbers in (("works", blocks.works), ("passages", blocks.passages)):
        if numbers is None:
            continue
        index = numbers.unique(return_inverse=True)[1]
        if (count := int(index.max()) + 1) > 1:
            # where no passage names its work, every passage is one
            named = blocks.passages is None or count < blocks.passages.unique().numel()
            return Clusters(unit if named else "passages", count, index)
    index = torch.arange(len(blocks))[:, None].expand(blocks.input_ids.shape)
    return Clusters("blocks", len(blocks), index)
