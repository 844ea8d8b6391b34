"""A model's answers on a held-out text: its final hidden states, kept once and compared with many models."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.processes import over_processes
from moe2dense.data.blocks import Blocks
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import OutputHead, output_head
from moe2dense.modeling.kinds import BuiltStudent, language_model
from moe2dense.teacher.model import Teacher

# N blocks, S block length, H hidden size

AnyModel = Teacher | BuiltStudent | PreTrainedModel  # whatever gives final hidden states of blocks


@dataclass
class Reference:
    """A model's answers on a fixed set of text: final normed hidden states [N, S, H] and the head that reads them."""

    blocks: Blocks
    hidden: Tensor
    head: OutputHead


@torch.no_grad()
def reference(model: AnyModel | Reference, blocks: Blocks, batch: int = 8) -> Reference:
    """Run a model once over `blocks`, `batch` of them at a time; a Reference is returned as it is.

    A streamed teacher reads its layers once for all blocks. Processes that have joined share the blocks, and each gets all answers.
    """
    if isinstance(model, Reference):
        return model
    if isinstance(model, Teacher):
        return Reference(blocks, over_processes(len(blocks), lambda rows: _streamed(model, blocks[rows])), model.head)
    causal = language_model(model)
    head = output_head(causal)
    device = head.weight.device
    hidden = over_processes(len(blocks), lambda rows: hidden_states(causal, blocks[rows], batch, device))
    return Reference(blocks, hidden, head)


def _streamed(teacher: Teacher, blocks: Blocks) -> Tensor:
    """Return a streamed teacher's final hidden states [N, S, H]."""
    output = teacher.run(blocks.input_ids, blocks.attention_mask, blocks.document_ids, logits=False)
    return output.hidden_states


def hidden_states(model: PreTrainedModel, blocks: Blocks, batch: int, device: torch.device) -> Tensor:
    """Return the model's final hidden states [N, S, H] of `blocks`, on the CPU."""
    starts = range(0, len(blocks), batch)
    with evaluation_mode(model):
        parts = [final_hidden(model, model_inputs(blocks[i : i + batch], device)).cpu() for i in starts]
    return torch.cat(parts)
