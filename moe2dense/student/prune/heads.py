"""Choose which attention heads a smaller student keeps, and cut the teacher's projections to them.

A head is scored by the energy that it writes to the residual stream (Minitron, arXiv 2407.14679, takes the norm of its activations, before the output
projection). Heads that share keys and values stay together: the best KV groups, and in each the same number of its best heads.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.observer import Observer

if TYPE_CHECKING:
    from moe2dense.teacher.model import Teacher

# T tokens, A query heads, G KV groups, D head dimension, H hidden


class HeadEnergy(Observer):
    """Collect `energy` {layer: [A]}: the sum over real tokens of |O_a z_ta|^2.

    z_ta [D] is what head a gives to its part O_a [H, D] of the output projection.
    """

    def __init__(self, heads: int, rules: Mapping[str, str]):
        self.heads = heads
        self.path = next(path for path, kind in rules.items() if kind == "query columns")
        self.energy: dict[int, Tensor] = {}
        self._pending: list[Tensor] = []

    @contextmanager
    def watching(self, teacher: "Teacher") -> Iterator[None]:
        """Observe the teacher's output projections within the context."""
        hooks = []
        for layer in teacher.body.layers:
            try:
                module = layer.get_submodule(self.path)
            except AttributeError:
                continue  # a layer whose mixer has no attention heads
            hooks.append(module.register_forward_pre_hook(self._add_energy))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add_energy(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        z = args[0].reshape(-1, self.heads, args[0].shape[-1] // self.heads).float()
        weight: Any = module.weight
        o = weight.float().view(weight.shape[0], self.heads, -1)
        self._pending.append(torch.einsum("tad,ade,tae->ta", z, torch.einsum("had,hae->ade", o, o), z).cpu())

    def layer(self, layer: LayerPass) -> None:
        """Add one layer of one macro-batch."""
        if self._pending:
            energy = torch.cat(self._pending)[layer.token_mask.cpu()].double().sum(0)
            self.energy[layer.index] = self.energy.get(layer.index, torch.zeros_like(energy)) + energy
            self._pending.clear()


@dataclass(frozen=True)
class KeptHeads:
    """The heads of one layer that stay."""

    # indices, ascending, of the query heads and of the KV groups that stay
    query: Tensor
    group: Tensor
    # how many the teacher has
    queries: int
    groups: int

    def cut(self, path: str, value: Tensor, rules: Mapping[str, str]) -> Tensor:
        """Return the tensor `path` of a decoder layer with only these heads, where a rule of the host's card names it."""
        for prefix, kind in rules.items():
            if path != prefix and not path.startswith(prefix + "."):
                continue
            what, axis = kind.split()
            index, count = (self.query, self.queries) if what == "query" else (self.group, self.groups)
            dim = 1 if axis == "columns" else 0
            if dim >= value.dim():
                return value  # the bias behind the output projection
            unit = value.shape[dim] // count
            rows = (index[:, None] * unit + torch.arange(unit)).flatten()
            return value.index_select(dim, rows.to(value.device))
        return value


def best_heads(energy: Tensor, groups: int, keep: int, keep_groups: int) -> KeptHeads:
    """Return the `keep_groups` KV groups whose `keep` / `keep_groups` best heads write most energy [A], and these heads."""
    by_group = energy.view(groups, -1)
    each = keep // keep_groups
    top = by_group.topk(each, dim=1)
    group = top.values.sum(1).topk(keep_groups).indices.sort().values
    query = (group[:, None] * by_group.shape[1] + top.indices[group].sort(1).values).flatten()
    return KeptHeads(query, group, len(energy), groups)


def split_layer(name: str) -> tuple[int, str] | None:
    """Return (3, 'self_attn.q_proj.weight') for 'model.layers.3.self_attn.q_proj.weight'; None outside the layers."""
    match = re.search(r"\blayers\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None
