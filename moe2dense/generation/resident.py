"""What a transformers model in memory, such as a student, writes after the heads of blocks."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from moe2dense.generation.sampling import Sampling, choose, uniforms
from moe2dense.losses.head import model_head

# N blocks, S block length, P prompt length, H hidden, V vocabulary
ROWS = 64  # continued at a time


@torch.no_grad()
def continued(
    model: Any, input_ids: Tensor, prompt: int, sampling: Sampling, numbers: list[int], stop: Collection[int] = ()
) -> Tensor:
    """input_ids [N, S] with everything after the first `prompt` tokens written by the model; ids on the CPU.

    numbers: one per row; a row's text depends on the seed and its number, not on the rows beside it. A block is read as one
    document. Dropout is off. Keys and values of at most 64 rows are held at a time, and those rows end together: when each has
    written an id of `stop`, what follows is left as it was.
    """
    training = model.training
    model.eval()
    parts = [
        _continue(model, input_ids[a : a + ROWS], prompt, sampling, numbers[a : a + ROWS], stop)
        for a in range(0, len(input_ids), ROWS)
    ]
    model.train(training)
    return torch.cat(parts) if parts else input_ids.clone()


def _continue(
    model: Any, ids: Tensor, prompt: int, sampling: Sampling, numbers: list[int], stop: Collection[int]
) -> Tensor:
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    head, length = model_head(model), ids.shape[1]
    device = head.weight.device
    drawn = torch.stack([torch.from_numpy(uniforms(sampling.seed, n, length - prompt)) for n in numbers]).to(device)
    written = ids.clone().to(device)
    fresh, cache = written[:, :prompt], None
    ends, ended = torch.tensor(sorted(stop), device=device), torch.zeros(len(ids), dtype=torch.bool, device=device)
    for at in range(prompt, length):
        out = whole.base_model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        fresh = choose(head.logits(out.last_hidden_state[:, -1]).float(), sampling, drawn[:, at - prompt])[:, None]
        written[:, at] = fresh[:, 0]
        if stop:
            ended |= torch.isin(fresh[:, 0], ends)
            if bool(ended.all()):
                break
    return written.cpu()
