"""How close a student is to its teacher on held-out text: distributions, likelihood, calibration, each with an interval.

The teacher is run once (`reference`) and every student is judged against its final hidden states, so teacher and student
need never share memory and [tokens, vocabulary] never exists in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.evaluation.bootstrap import Bootstrap, Estimate, ratio

# N blocks, S block length, H hidden, V vocabulary, n judged tokens, G groups

CALIBRATION_BINS = 15


@dataclass
class Scores:
    """What `evaluate` found. KL and entropies in nats per token; an Estimate carries a 95 % interval over blocks.

    kl KL(teacher || student); agreement: both have the same first choice; top5: the teacher's first choice is among the
    student's five; correlation: Pearson, over tokens, of the probabilities both give the true next token; ece: expected
    calibration error of the first choice against the text (15 equal bins, Guo et al. 2017); entropy_gap: student minus
    teacher; rare_kl: KL on the tenth of the tokens that are rarest in the training text.
    """

    kl: Estimate
    nll: Estimate
    teacher_nll: Estimate
    perplexity: Estimate
    teacher_perplexity: Estimate
    agreement: Estimate
    top5: Estimate
    correlation: Estimate
    ece: Estimate
    teacher_ece: Estimate
    entropy: Estimate
    entropy_gap: Estimate
    rare_kl: Estimate
    by_domain: dict[str, dict[str, Any]]
    by_decile: list[dict[str, Any]]  # rarest tenth of the tokens first
    by_position: list[dict[str, Any]]
    worst_tokens: list[dict[str, Any]]
    tokens: int
    blocks: int
    kl_NS: Tensor = field(repr=False)  # [N, S] KL at every position, NaN where not judged
    _table: "Table" = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON holds them."""
        skip = {"kl_NS", "_table"}
        return {k: _plain(v) for k, v in self.__dict__.items() if k not in skip}


@dataclass
class Table:
    """The judged tokens: values by name [n], and for each its block, position and label."""

    values: dict[str, np.ndarray]
    block: np.ndarray
    position: np.ndarray
    label: np.ndarray
    decile: np.ndarray  # of token frequency, 0 = rarest
    domains: list[str]  # per block
    bootstrap: Bootstrap

    def sums(self, name: str | np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
        """Per block and group [N, G]: the sum of a column (or of the given values), in float64."""
        values = self.values[name] if isinstance(name, str) else name
        index = self.block * groups + (0 if group is None else group)
        n = self.bootstrap.blocks
        return np.bincount(index, values.astype(np.float64), minlength=n * groups).reshape(n, groups)

    def mean(self, name: str) -> Estimate:
        return self.bootstrap.mean(self.sums(name)[:, 0], self.sums(np.ones(len(self.block)))[:, 0])


def summarise(
    values: dict[str, Tensor], blocks: Any, keep: Tensor, bootstrap: Bootstrap, token_counts: Tensor | None = None
) -> Scores:
    """Scores from the per-token numbers of the positions `keep` [N, S-1]."""
    block, position = (x.numpy() for x in keep.nonzero(as_tuple=True))
    label = blocks.input_ids[:, 1:][keep].numpy()
    numbers = {k: v.numpy() for k, v in values.items()}
    decile = frequency_groups(label, token_counts)
    kl_NS = torch.full(blocks.input_ids.shape, float("nan"))
    kl_NS[:, :-1][keep] = values["kl"]
    return _scores(Table(numbers, block, position, label, decile, list(blocks.domains), bootstrap), kl_NS)


def split_domains(scores: Scores, domains: Sequence[str]) -> tuple[Scores, Scores] | None:
    """(scores of every other domain, scores of `domains`), as those may be lost; None where either has no judged token.

    The same resamples and the same deciles of token frequency as in `scores`, so the three can be compared.
    """
    table = scores._table
    inside = np.isin(np.array(table.domains, dtype=object), list(domains))  # per block
    if inside[table.block].all() or not inside[table.block].any():
        return None
    return _part(scores, ~inside), _part(scores, inside)


def _part(scores: Scores, blocks: np.ndarray) -> Scores:
    """The scores over the blocks where `blocks` [N] is true."""
    table = scores._table
    keep = blocks[table.block]
    part = Table(
        {k: v[keep] for k, v in table.values.items()},
        table.block[keep], table.position[keep], table.label[keep], table.decile[keep], table.domains, table.bootstrap,
    )  # fmt: skip
    return _scores(part, scores.kl_NS.masked_fill(~torch.from_numpy(blocks)[:, None], float("nan")))


def _scores(table: Table, kl_NS: Tensor) -> Scores:
    by_decile = _by_group(table, table.decile, 10)
    ones = np.ones(len(table.block))
    nll, teacher_nll = table.mean("nll"), table.mean("teacher_nll")
    return Scores(
        kl=table.mean("kl"),
        nll=nll,
        teacher_nll=teacher_nll,
        perplexity=_exp(nll),
        teacher_perplexity=_exp(teacher_nll),
        agreement=table.mean("agreement"),
        top5=table.mean("top5"),
        correlation=_correlation(table),
        ece=_ece(table, "confidence", "correct"),
        teacher_ece=_ece(table, "teacher_confidence", "teacher_correct"),
        entropy=table.mean("entropy"),
        entropy_gap=table.bootstrap.mean(
            (table.sums("entropy") - table.sums("teacher_entropy"))[:, 0], table.sums(ones)[:, 0]
        ),
        rare_kl=by_decile[0]["kl"],
        by_domain=_by_domain(table),
        by_decile=[{"decile": i + 1, **row} for i, row in enumerate(by_decile)],
        by_position=_by_position(table),
        worst_tokens=_worst_tokens(table),
        tokens=len(table.block),
        blocks=len(np.unique(table.block)),
        kl_NS=kl_NS,
        _table=table,
    )


def frequency_groups(label: np.ndarray, token_counts: Tensor | None = None, groups: int = 10) -> np.ndarray:
    """Each judged token's decile of token frequency [n], 0 = rarest; the same id always falls in the same group.

    Ids are ordered by their count (then id) and cut so that the groups hold about equally many judged tokens. Where a
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


def retention(student: Scores, control: Scores, without: Sequence[str] = ()) -> dict[str, Any]:
    """Share of the gap between control and teacher that the student closes, 1 - KL(student) / KL(control), paired.

    {"overall": Estimate, leaving out the domains `without`, "by_domain": {domain: Estimate}}; 1 is the teacher, 0 the control, below 0 is worse than it.
    Raises UserError where the two were judged on different text.
    """
    a, b = student._table, control._table
    if not (np.array_equal(a.block, b.block) and np.array_equal(a.label, b.label)):
        raise UserError("control: judged on other text than the student; evaluate both on the same blocks")

    def share(mask: np.ndarray) -> Estimate:
        sums = np.stack([t.sums(np.where(mask, t.values["kl"], 0))[:, 0] for t in (a, b)], 1)
        return a.bootstrap.estimate(sums, lambda totals: 1 - ratio(totals))

    domains = np.array(a.domains, dtype=object)[a.block]
    return {
        "overall": share(~np.isin(domains, list(without))),
        "by_domain": {d: share(domains == d) for d in sorted(set(a.domains)) if (domains == d).any()},
    }


def _exp(x: Estimate) -> Estimate:
    return Estimate(np.exp(x), np.exp(x.low), np.exp(x.high))


def _correlation(table: Table) -> Estimate:
    x, y = table.values["teacher_p"].astype(np.float64), table.values["p"].astype(np.float64)
    columns = [table.sums(v)[:, 0] for v in (np.ones(len(x)), x, y, x * x, y * y, x * y)]

    def pearson(t: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(t, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sxy - sx * sy / n) / np.sqrt((sxx - sx * sx / n) * (syy - sy * sy / n))

    return table.bootstrap.estimate(np.stack(columns, 1), pearson)


def _ece(table: Table, confidence: str, correct: str) -> Estimate:
    k = CALIBRATION_BINS
    bins = np.minimum((table.values[confidence] * k).astype(np.int64), k - 1)
    gap = table.sums(table.values[correct].astype(np.float64) - table.values[confidence], bins, k)
    sums = np.concatenate([gap, table.sums(np.ones(len(bins)))], 1)
    return table.bootstrap.estimate(sums, lambda t: np.abs(t[..., :k]).sum(-1) / t[..., k])


def _by_group(table: Table, group: np.ndarray, groups: int) -> list[dict[str, Any]]:
    count = table.sums(np.ones(len(group)), group, groups)
    columns = {k: table.sums(k, group, groups) for k in ("kl", "nll", "teacher_nll", "agreement")}
    rows = []
    for g in range(groups):
        means = {k: table.bootstrap.mean(v[:, g], count[:, g]) for k, v in columns.items()}
        rows.append({"tokens": int(count[:, g].sum()), "blocks": int((count[:, g] > 0).sum()), **means})
    return rows


def _by_domain(table: Table) -> dict[str, dict[str, Any]]:
    names = sorted(set(table.domains))
    index = np.array([names.index(d) for d in table.domains])[table.block]
    rows = _by_group(table, index, len(names))
    return {name: row for name, row in zip(names, rows, strict=True) if row["tokens"]}


def _by_position(table: Table) -> list[dict[str, Any]]:
    # doubling ranges 0, 1, 2-3, 4-7, ...: context helps most at the start
    group = np.floor(np.log2(np.maximum(table.position, 0.5))).astype(np.int64) + 1
    rows = _by_group(table, group, int(group.max()) + 1)
    edges = [(0 if g == 0 else 2 ** (g - 1), 2**g) for g in range(len(rows))]
    return [{"start": a, "end": b, **row} for (a, b), row in zip(edges, rows, strict=True) if row["tokens"]]


def _worst_tokens(table: Table, least: int = 3, most: int = 20) -> list[dict[str, Any]]:
    size = int(table.label.max()) + 1
    count = np.bincount(table.label, minlength=size)
    kl, t, s = (np.bincount(table.label, table.values[k], size) for k in ("kl", "teacher_nll", "nll"))
    mean = np.where(count >= least, kl / np.maximum(count, 1), -1)
    best = [int(i) for i in np.argsort(-mean)[:most] if mean[i] >= 0]
    return [
        {"id": i, "count": int(count[i]), "kl": mean[i], "teacher_nll": t[i] / count[i], "nll": s[i] / count[i]}
        for i in best
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, np.floating) else value
