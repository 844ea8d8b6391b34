"""Compare two next-token distributions on every token, from final hidden states, a few tokens at a time."""

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.modeling.head import OutputHead, in_float32

# n tokens, H hidden, V vocabulary, N blocks, S block length

CHUNK = 2**23  # numbers of [tokens, vocabulary] in memory at a time: 32 MB in fp32, a handful of such pieces


def scored_positions(blocks: Blocks) -> Tensor:
    """Return the positions [N, S-1] bool that are judged: this token and the next are real, of one document, and labelled."""
    ids = blocks.input_ids
    keep = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    if blocks.attention_mask is not None:
        keep &= blocks.attention_mask[:, :-1].bool() & blocks.attention_mask[:, 1:].bool()
    if blocks.document_ids is not None:
        keep &= blocks.document_ids[:, :-1] == blocks.document_ids[:, 1:]
    if blocks.labels_mask is not None:
        keep &= blocks.labels_mask[:, 1:].bool()
    if blocks.prefix_mask is not None:
        keep &= ~blocks.prefix_mask[:, 1:]
    return keep


@torch.no_grad()
def score_tokens(
    hidden_t: Tensor, head_t: OutputHead, hidden_s: Tensor, head_s: OutputHead, labels: Tensor, chunk: int = CHUNK
) -> dict[str, Tensor]:
    """Return every per-token number of n tokens, fp32 on the CPU; hidden_t [n, Ht], hidden_s [n, Hs], labels [n].

    The [tokens, vocabulary] matrix exists only `chunk` numbers at a time. Where the two vocabularies differ in size
    (padded embeddings) both distributions are taken over the ids they share.
    """
    width = min(head_t.weight.shape[0], head_s.weight.shape[0])
    if len(labels) and int(labels.max()) >= width:
        raise UserError(f"data: token id {int(labels.max())} is outside the {width} ids both models know")
    step = max(1, chunk // width)
    device = head_s.weight.device
    exact_t, exact_s = in_float32(head_t), in_float32(head_s)
    parts: list[dict[str, Tensor]] = []
    for i in range(0, len(labels), step):
        log_t = exact_t.logits(hidden_t[i : i + step].to(exact_t.weight))[:, :width].to(device)
        log_s = exact_s.logits(hidden_s[i : i + step].to(exact_s.weight))[:, :width]
        for model, logits in (("teacher", log_t), ("student", log_s)):
            _check_answers(model, logits)
        parts.append(_score(log_t.log_softmax(-1), log_s.log_softmax(-1), labels[i : i + step].to(device)))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}


def _check_answers(model: str, logits: Tensor) -> None:
    """Raise UserError where a token has NaN for a logit, or infinity for its largest: no distribution comes of it."""
    spoilt = int((~torch.isfinite(logits.amax(-1))).sum())
    if spoilt:
        raise UserError(
            f"{model}: its logits are NaN or infinite for {spoilt} of {len(logits)} tokens, so that nothing can be judged; see that "
            f"its weights are those of a run that went well"
        )


def _score(log_t: Tensor, log_s: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score log-probabilities log_t, log_s [n, V] of teacher and student."""
    p_t, p_s = log_t.exp(), log_s.exp()
    top_t, top_s = log_t.argmax(-1), log_s.argmax(-1)
    label_t, label_s = (x.gather(1, labels[:, None])[:, 0] for x in (log_t, log_s))
    five = log_s.topk(min(5, log_s.shape[1]), -1).indices
    numbers = {
        "kl": (p_t * (log_t - log_s)).sum(-1).clamp_min(0),
        "teacher_nll": -label_t,
        "nll": -label_s,
        "agreement": (top_t == top_s).float(),
        "acceptance": torch.minimum(p_t, p_s).sum(-1),
        "top5": (five == top_t[:, None]).any(-1).float(),
        "teacher_p": label_t.exp(),
        "p": label_s.exp(),
        "teacher_entropy": -(p_t * log_t).sum(-1),
        "entropy": -(p_s * log_s).sum(-1),
        "teacher_confidence": p_t.amax(-1),
        "confidence": p_s.amax(-1),
        "teacher_correct": (top_t == labels).float(),
        "correct": (top_s == labels).float(),
    }
    return {k: v.float().cpu() for k, v in numbers.items()}
