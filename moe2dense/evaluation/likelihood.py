"""How likely a model finds given tokens, from its final hidden states, a few tokens at a time."""

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.evaluation.reference import AnyModel, Reference, reference
from moe2dense.evaluation.token_metrics import CHUNK
from moe2dense.modeling.head import OutputHead, in_float32

# n tokens, N blocks, S block length, H hidden size, V vocabulary


@torch.no_grad()
def label_scores(hidden: Tensor, head: OutputHead, labels: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return (log-probability [n] of each label, whether it is the first choice [n]) from final hidden states [n, H].

    Both are on the CPU. [tokens, vocabulary] exists only `chunk` numbers at a time.
    """
    head = in_float32(head)
    step = max(1, chunk // head.weight.shape[0])
    scores, first = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for i in range(0, len(labels), step):
        logits = head.logits(hidden[i : i + step].to(head.weight))
        part = labels[i : i + step].to(logits.device)
        scores.append(logits.log_softmax(-1).gather(1, part[:, None])[:, 0].cpu())
        first.append((logits.argmax(-1) == part).cpu())
    return torch.cat(scores), torch.cat(first)


def text_nll(answers: Reference, judged: Tensor) -> Tensor:
    """Return nats [N, S] of every token where `judged` is true, given those before it; 0 elsewhere.

    The first token is never judged.
    """
    keep = judged[:, 1:]
    log_probabilities, _ = label_scores(
        answers.hidden[:, :-1][keep], answers.head, answers.blocks.input_ids[:, 1:][keep]
    )
    nll = log_probabilities.new_zeros(judged.shape)
    nll[:, 1:][keep] = -log_probabilities
    return nll


def answer_nll(model: AnyModel | Reference, blocks: Blocks) -> float:
    """Return a model's mean nats per learnt token of held-out answers."""
    answers, labels = reference(model, blocks), blocks.labels()
    learnt = labels >= 0
    log_probabilities, _ = label_scores(answers.hidden[learnt], answers.head, labels[learnt])
    return -float(log_probabilities.sum()) / max(1, len(log_probabilities))
