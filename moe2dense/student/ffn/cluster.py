"""Merge experts that answer alike, then put the merged ones side by side: the method `cluster`."""

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from moe2dense.student.ffn.align import aligned_average
from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate
from moe2dense.student.ffn.energy import trim_to_width
from moe2dense.student.ffn.routed import folded
from moe2dense.student.ffn.task import FFNTask, SourcedFFN, without_source


def groups(mean_output: Tensor, count: int) -> list[Tensor]:
    """Group experts into `count` groups by average-linkage clustering of their mean outputs [E, H]; return index tensors.

    As HC-SMoE (Chen et al., arXiv 2410.08589), whose measure of likeness is the Euclidean distance of mean outputs. There are fewer groups only
    where experts answer identically.
    """
    if len(mean_output) == 1 or count >= len(mean_output):
        return [torch.tensor([e]) for e in range(len(mean_output))]
    tree = linkage(mean_output.double().numpy(force=True), method="average")
    labels = torch.as_tensor(fcluster(tree, count, criterion="maxclust"))
    return [torch.nonzero(labels == label).flatten() for label in labels.unique()]


def cluster(experts: Experts, alpha: Tensor, mean_output: Tensor, count: int) -> tuple[DenseFFN, list[Tensor]]:
    """Return `count` merged experts side by side, and which experts went into each.

    Within a group neurons are aligned and averaged in proportion to alpha [E]; the merged expert carries the group's summed alpha.
    """
    members = groups(mean_output, count)
    merged = [aligned_average([experts[e] for e in m.tolist()], alpha[m.to(alpha.device)]) for m in members]
    return concatenate(merged), members


def cluster_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return as many merged experts as cover the width, trimmed to it."""
    assert task.stats is not None
    count = max(1, -(-width // task.experts[0].gate.shape[0]))
    ffn, _ = cluster(*folded(task), task.stats.mean_output, min(count, len(task.experts)))
    return without_source(trim_to_width(ffn, task.x, width))
