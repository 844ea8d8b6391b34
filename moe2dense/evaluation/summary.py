"""From per-token numbers to Scores: means, perplexity, correlation and calibration, each with its interval."""

import numpy as np
import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.data.frequency import frequency_deciles
from moe2dense.evaluation.bootstrap import Bootstrap, Estimate
from moe2dense.evaluation.breakdowns import by_domain, by_group, by_position, worst_tokens
from moe2dense.evaluation.clusters import Clusters
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.token_table import TokenTable

# N blocks, S block length

CALIBRATION_BINS = 15
THIS_TEXT, TRAINING_TEXT = "the scored text", "the training text"


def summarise(
    values: dict[str, Tensor],
    blocks: Blocks,
    keep: Tensor,
    clusters: Clusters,
    bootstrap: Bootstrap,
    token_counts: Tensor | None = None,
) -> Scores:
    """Summarise the per-token numbers of the positions `keep` [N, S-1], with intervals over clusters of the text."""
    block, position = (x.numpy() for x in keep.nonzero(as_tuple=True))
    labels = blocks.input_ids[:, 1:][keep]
    kl_NS = torch.full(blocks.input_ids.shape, float("nan"), dtype=values["kl"].dtype)
    kl_NS[:, :-1][keep] = values["kl"]
    table = TokenTable(
        values={k: v.numpy() for k, v in values.items()},
        block=block,
        cluster=clusters.index[:, :-1][keep].numpy(),
        position=position,
        label=labels.numpy(),
        decile=frequency_deciles(labels, token_counts).numpy(),
        domains=list(blocks.domains),
        bootstrap=bootstrap,
        unit=clusters.unit,
        counted_in=THIS_TEXT if token_counts is None else TRAINING_TEXT,
    )
    return scores_of_table(table, kl_NS)


def scores_of_table(table: TokenTable, kl_NS: Tensor) -> Scores:
    """Return the Scores of a table of tokens; kl_NS: its KL at every position [N, S]."""
    by_decile = by_group(table, table.decile, 10)
    ones = np.ones(len(table.block))
    nll, teacher_nll = table.mean("nll"), table.mean("teacher_nll")
    entropy_gap = (table.sums("entropy") - table.sums("teacher_entropy"))[:, 0]
    return Scores(
        kl=table.mean("kl"),
        nll=nll,
        teacher_nll=teacher_nll,
        perplexity=_exp(nll),
        teacher_perplexity=_exp(teacher_nll),
        agreement=table.mean("agreement"),
        top5=table.mean("top5"),
        acceptance=table.mean("acceptance"),
        correlation=_correlation(table),
        ece=_calibration_error(table, "confidence", "correct"),
        teacher_ece=_calibration_error(table, "teacher_confidence", "teacher_correct"),
        entropy=table.mean("entropy"),
        entropy_gap=table.bootstrap.mean(entropy_gap, table.sums(ones)[:, 0]),
        rare_kl=by_decile[0]["kl"],
        by_domain=by_domain(table),
        by_decile=[{"decile": i + 1, **row} for i, row in enumerate(by_decile)],
        by_position=by_position(table),
        worst_tokens=worst_tokens(table),
        tokens=len(table.block),
        blocks=len(np.unique(table.block)),
        clusters=len(np.unique(table.cluster)),
        unit=table.unit,
        rare_by=table.counted_in,
        kl_NS=kl_NS,
        token_table=table,
    )


def _exp(x: Estimate) -> Estimate:
    return Estimate(np.exp(x), np.exp(x.low), np.exp(x.high))


def _correlation(table: TokenTable) -> Estimate:
    """Return Pearson's correlation of the probabilities that teacher and student give the true next token."""
    x, y = table.values["teacher_p"].astype(np.float64), table.values["p"].astype(np.float64)
    columns = [table.sums(v)[:, 0] for v in (np.ones(len(x)), x, y, x * x, y * y, x * y)]

    def pearson(t: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(t, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sxy - sx * sy / n) / np.sqrt((sxx - sx * sx / n) * (syy - sy * sy / n))

    return table.bootstrap.estimate(np.stack(columns, 1), pearson)


def _calibration_error(table: TokenTable, confidence: str, correct: str) -> Estimate:
    """Return the expected calibration error over equal bins of confidence (Guo et al., 1706.04599)."""
    k = CALIBRATION_BINS
    bins = np.minimum((table.values[confidence] * k).astype(np.int64), k - 1)
    gap = table.sums(table.values[correct].astype(np.float64) - table.values[confidence], bins, k)
    sums = np.concatenate([gap, table.sums(np.ones(len(bins)))], 1)
    return table.bootstrap.estimate(sums, lambda t: np.abs(t[..., :k]).sum(-1) / t[..., k])
