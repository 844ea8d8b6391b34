"""Measure what a teacher's soft labels on a text say beyond the text itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import HiddenRows, LogitRows, TeacherRows

# n tokens, V vocabulary

TOP = (1, 5, 12, 32)
_CHUNK = 2**23  # logits that are in memory at a time
_EXAMPLES = 5


def _logits(rows: TeacherRows, part: slice) -> Tensor:
    if isinstance(rows, HiddenRows):
        return rows.head.logits(rows.hidden[part].to(rows.head.weight)).float()
    if isinstance(rows, LogitRows):
        return rows.logits[part].float()
    raise UserError(
        "the analysis needs `hidden` or `full` targets; sampled and topk hold a part of the distribution only"
    )


@torch.no_grad()
def soft_label_numbers(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return numbers per token [n], from logits [n, V] and labels [n]; nats.

    entropy H(p); nll -log p(label); top-k mass; dark: the mass off the likeliest token; top1_is_label: 1 where the likeliest
    token is the label.
    """
    labels = labels.to(logits.device)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = log_p.topk(min(max(TOP), log_p.shape[-1])).values.exp().cumsum(-1)
    masses = {f"top{k}_mass": top[:, min(k, top.shape[1]) - 1] for k in TOP}
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    numbers = {"entropy": entropy, "nll": nll, "dark": 1 - top[:, 0]} | masses
    return numbers | {"top1_is_label": (log_p.argmax(-1) == labels).float()}


@torch.no_grad()
def analyze_targets(
    targets: Targets,
    blocks: Blocks,
    decode: Callable[[list[int]], str] | None = None,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Measure the soft labels of `blocks`: means over all tokens and by domain, and examples of the most spread ones.

    Returns {"all": {name: mean, "tokens": n}, "domains": {domain: ...}, "examples": [...]}, where `information` is the
    mean of nll - entropy: what the text adds to what the teacher expects (near 0 for a calibrated teacher). decode turns
    ids into text, for the examples. Raises UserError for targets that hold only a part of the distribution.
    """
    sums: dict[str, dict[str, float]] = {}
    widest: list[tuple[float, int, int]] = []
    for i in range(len(blocks)):
        labels = blocks[[i]].labels()[0]
        labelled = (labels >= 0).nonzero()[:, 0]
        if not len(labelled):
            continue
        rows = targets.batch([i]).select(labelled)
        step = max(1, _CHUNK // (rows.vocabulary or 1))
        for start in range(0, len(labelled), step):
            part = slice(start, start + step)
            numbers = soft_label_numbers(_logits(rows, part), labels[labelled[part]])
            for group in ("", blocks.domains[i] or "(none)"):
                group_sums = sums.setdefault(group, dict.fromkeys([*numbers, "tokens"], 0.0))
                for name, values in numbers.items():
                    group_sums[name] += float(values.double().sum())
                group_sums["tokens"] += len(values)
            most = int(numbers["entropy"].argmax())
            widest.append((float(numbers["entropy"][most]), i, int(labelled[part][most])))
        if progress:
            progress("analyze", i + 1, len(blocks))
    means = {g: _means(s) for g, s in sums.items()}
    examples = [_example(targets, blocks, i, s, decode) for _, i, s in sorted(widest, reverse=True)[:_EXAMPLES]]
    return {"all": means.pop("", {}), "domains": means, "examples": examples}


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens = sums["tokens"]
    means = {k: v / tokens for k, v in sums.items() if k != "tokens"} | {"tokens": tokens}
    return means | {"information": means["nll"] - means["entropy"]}


def _example(
    targets: Targets, blocks: Blocks, block: int, place: int, decode: Callable[[list[int]], str] | None
) -> dict[str, Any]:
    """Return one position with the text before it and the tokens that the teacher expects."""
    rows = targets.batch([block]).select(torch.tensor([place]))
    top = _logits(rows, slice(None))[0].softmax(-1).topk(5)
    ids = blocks[[block]].input_ids[0]
    before, label = ids[max(0, place - 15) : place + 1].tolist(), int(ids[place + 1])

    def show(ids: list[int]) -> str | list[int]:
        return ids if decode is None else decode(ids)

    return {
        "block": block,
        "position": place,
        "context": show(before),
        "label": show([label]),
        "expected": [(show([int(t)]), float(p)) for t, p in zip(top.indices, top.values, strict=True)],
    }
