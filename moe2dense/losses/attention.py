"""Match attention maps: the student's learn the teacher's (TinyBERT, 1909.10351; as KL, MiniLM, 2002.10957)."""

import torch
from torch import Tensor, nn

from moe2dense.errors import UserError
from moe2dense.losses.feature_spec import layer_pairs
from moe2dense.losses.hidden_states import Tokens

# n tokens, hs and ht heads, S block length


def group_heads(maps: Tensor, heads: int) -> Tensor:
    """Average attention maps [n, h, ...] of neighbouring heads into `heads` of them. Raises UserError if h is no multiple."""
    if maps.shape[1] % heads:
        raise UserError(
            f"attention transfer: {maps.shape[1]} heads cannot be grouped into {heads}; one must divide the other"
        )
    return maps.unflatten(1, (heads, -1)).mean(2)


def token_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return [n]: mean over heads of KL(teacher || student) between the rows of attention maps, [n, hs, S] and [n, ht, S].

    Heads are grouped to the smaller of the two numbers.
    """
    heads = min(student.shape[1], teacher.shape[1])
    s, t = group_heads(student, heads), group_heads(teacher, heads)
    # masked columns are 0 in both; xlogy keeps them 0
    return (torch.xlogy(t, t) - t * s.clamp(min=torch.finfo(s.dtype).tiny).log()).sum(-1).mean(1)


class AttentionMatch(nn.Module):
    """The loss between the attention maps of chosen layers; student and teacher: (layers, hidden size)."""

    def __init__(self, layer_map: str, kind: str, student: tuple[int, int], teacher: tuple[int, int], heads: int):
        super().__init__()
        self.pairs = layer_pairs(layer_map, student[0], teacher[0])

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        """Return the mean over layer pairs of the tokens' weighted sum; maps [n, h, S] by name."""
        parts = [token_attention(student[f"maps-{s}"], teacher[f"maps-{t}"]) for s, t in self.pairs]
        # a masked row may be NaN, where softmax saw nothing
        return torch.stack([torch.where(tokens.weights > 0, p, 0.0) @ tokens.weights for p in parts]).mean()
