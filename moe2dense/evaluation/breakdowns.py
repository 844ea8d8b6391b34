"""Scores by part of the text: by token frequency, domain and position, and the tokens that are predicted worst."""

from typing import Any

import numpy as np

from moe2dense.evaluation.token_table import TokenTable

GROUP_COLUMNS = ("kl", "nll", "teacher_nll", "agreement")


def by_group(table: TokenTable, group: np.ndarray, groups: int) -> list[dict[str, Any]]:
    """Return tokens, clusters and means of every group, `group` [n] giving each token's."""
    count = table.sums(np.ones(len(group)), group, groups)
    columns = {k: table.sums(k, group, groups) for k in GROUP_COLUMNS}
    rows = []
    for g in range(groups):
        means = {k: table.bootstrap.mean(v[:, g], count[:, g]) for k, v in columns.items()}
        rows.append({"tokens": int(count[:, g].sum()), "clusters": int((count[:, g] > 0).sum()), **means})
    return rows


def by_domain(table: TokenTable) -> dict[str, dict[str, Any]]:
    """Return the means of every domain that has judged tokens."""
    names = sorted(set(table.domains))
    index = np.array([names.index(d) for d in table.domains])[table.block]
    rows = by_group(table, index, len(names))
    return {name: row for name, row in zip(names, rows, strict=True) if row["tokens"]}


def by_position(table: TokenTable) -> list[dict[str, Any]]:
    """Return means over the doubling ranges of positions 0, 1, 2-3, 4-7, ...: context helps most at the start."""
    group = np.floor(np.log2(np.maximum(table.position, 0.5))).astype(np.int64) + 1
    rows = by_group(table, group, int(group.max()) + 1)
    edges = [(0 if g == 0 else 2 ** (g - 1), 2**g) for g in range(len(rows))]
    return [{"start": a, "end": b, **row} for (a, b), row in zip(edges, rows, strict=True) if row["tokens"]]


def worst_tokens(table: TokenTable, least: int = 3, most: int = 20) -> list[dict[str, Any]]:
    """Return the ids of highest mean KL among those judged at least `least` times, worst first."""
    size = int(table.label.max()) + 1
    count = np.bincount(table.label, minlength=size)
    kl, teacher, student = (np.bincount(table.label, table.values[k], size) for k in ("kl", "teacher_nll", "nll"))
    mean = np.where(count >= least, kl / np.maximum(count, 1), -1)
    worst = [int(i) for i in np.argsort(-mean)[:most] if mean[i] >= 0]
    return [
        {
            "id": i,
            "count": int(count[i]),
            "kl": mean[i],
            "teacher_nll": teacher[i] / count[i],
            "nll": student[i] / count[i],
        }
        for i in worst
    ]
