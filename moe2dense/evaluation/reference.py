"""The teacher on a held-out text: its final hidden states, kept once and compared with many models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.evaluation import token_metrics as metrics
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import output_head


@dataclass
class Reference:
    """A model's answers on a fixed set of text: final normed hidden states [N, S, H] and the head that reads them."""

    blocks: Any  # data.Blocks
    hidden: Tensor
    head: Any  # .weight [V, H], .logits(hidden)


@torch.no_grad()
def reference(model: Any, blocks: Any, batch: int = 8) -> Reference:
    """Run a teacher (streamed or a transformers model) once over `blocks`."""
    if isinstance(model, Reference):
        return model
    if hasattr(model, "run") and hasattr(model, "head"):  # a streamed teacher reads its layers once for all blocks
        out = model.run(blocks.input_ids, blocks.attention_mask, blocks.document_ids, logits=False)
        return Reference(blocks, out.hidden_states, model.head)
    model = model.model if hasattr(model, "provenance") else model
    head = output_head(model)
    return Reference(blocks, _hidden(model, blocks, batch, head.weight.device), head)


def _hidden(model: Any, blocks: Any, batch: int, device: Any) -> Tensor:
    starts = range(0, len(blocks), batch)
    with evaluation_mode(model):
        parts = [final_hidden(model, model_inputs(blocks[i : i + batch], device)).cpu() for i in starts]
    return torch.cat(parts)


@torch.no_grad()
def label_scores(hidden: Tensor, head: Any, labels: Tensor, chunk: int = metrics.CHUNK) -> tuple[Tensor, Tensor]:
    """(log-probability [n] of each label, whether it is the first choice [n]) from final hidden states [n, H], on the CPU.

    [tokens, vocabulary] exists only `chunk` numbers at a time.
    """
    step = max(1, chunk // head.weight.shape[0])
    scores, first = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for i in range(0, len(labels), step):
        logits = head.logits(hidden[i : i + step].to(head.weight)).float()
        mine = labels[i : i + step].to(logits.device)
        scores.append(logits.log_softmax(-1).gather(1, mine[:, None])[:, 0].cpu())
        first.append((logits.argmax(-1) == mine).cpu())
    return torch.cat(scores), torch.cat(first)


def answer_nll(model: Any, blocks: Blocks) -> float:
    """The student's mean nats per learnt token of held-out answers."""
    ref, labels = reference(model, blocks), blocks.labels()
    kept = labels >= 0
    found, _ = label_scores(ref.hidden[kept], ref.head, labels[kept])
    return -float(found.sum()) / max(1, len(found))
