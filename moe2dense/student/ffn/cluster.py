"""`cluster`: merge experts that answer alike, then put the merged ones side by side."""

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from moe2dense.student.ffn.align import aligned_average
from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate


def groups(mean_output: Tensor, count: int) -> list[Tensor]:
    """`count` groups of experts, as index tensors, by average-linkage clustering of their mean outputs [E, H].

    As HC-SMoE (Chen et al., arXiv 2410.08589), whose measure of likeness is the Euclidean distance of mean outputs. Fewer groups come back
    only where experts answer identically.
    """
    if len(mean_output) == 1 or count >= len(mean_output):
        return [torch.tensor([e]) for e in range(len(mean_output))]
    tree = linkage(mean_output.double().numpy(force=True), method="average")
    labels = torch.as_tensor(fcluster(tree, count, criterion="maxclust"))
    return [torch.nonzero(labels == label).flatten() for label in labels.unique()]


def cluster(experts: Experts, alpha: Tensor, mean_output: Tensor, count: int) -> tuple[DenseFFN, list[Tensor]]:
    """`count` merged experts side by side, and which experts went into each.

    Within a group neurons are aligned and averaged in proportion to alpha [E]; the merged expert carries the group's summed alpha.
    """
    members = groups(mean_output, count)
    merged = [aligned_average([experts[e] for e in m.tolist()], alpha[m.to(alpha.device)]) for m in members]
    return concatenate(merged), members
