"""The student's own hidden states, carried through its layers while these are being built."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe2dense.families.cards import StudentCard
from moe2dense.modeling import internals
from moe2dense.student.footprint import rows_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# N blocks, S block length, T = N * S tokens, H hidden


class LayerRunner:
    """Runs a dense host layer by layer on blocks [N, S], its FFN replaced where that is asked for.

    `attention_mask` and `position_ids` are what transformers is given (documents are told by positions that start again at 0).
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        card: StudentCard,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ):
        self.model, self.card, self.ids = model, card, input_ids
        self.mask, self.positions = attention_mask, position_ids
        _, self.body = internals.decoder(model)
        self.device = next(self.body.embed_tokens.parameters()).device
        self.dtype = next(self.body.embed_tokens.parameters()).dtype
        config = model.config.get_text_config()
        self.hidden_size, self.at_once = int(config.hidden_size), rows_at_once(int(getattr(config, card.width)))
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def chunks(self) -> list[slice]:
        """Rows of blocks that go through a layer at once."""
        n, step = len(self.ids), max(1, self.at_once // self.ids.shape[1])
        return [slice(a, min(a + step, n)) for a in range(0, n, step)]

    @torch.no_grad()
    def embed(self) -> Tensor:
        """[N, S, H]: what enters the first layer."""
        parts: list[Tensor] = []

        def note(index: int, hidden: Tensor, _: dict[str, Any]) -> Tensor:
            if index == 0:
                parts.append(hidden)
            return hidden

        for rows in self.chunks():
            vectors = self.body.embed_tokens(self.ids[rows].to(self.device))
            internals.run_body(self.body, vectors, *self._masks(rows), note)
        return torch.cat(parts)

    def _masks(self, rows: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
        pick = [None if t is None else t[rows].to(self.device) for t in (self.mask, self.positions)]
        return pick[0], pick[1]

    @torch.no_grad()
    def arguments(self, index: int, rows: slice | Tensor) -> dict[str, Any]:
        """Keyword arguments of decoder layer `index` for these blocks, as the family's own forward makes them."""
        count = len(self.ids[rows])
        plain = self.mask is None and self.positions is None
        key = (0, count) if plain else (rows.start, rows.stop) if isinstance(rows, slice) else None
        found = self._arguments.get(key) if key else None
        if found is None:
            found = []
            blank = torch.zeros(count, self.ids.shape[1], self.hidden_size, dtype=self.dtype, device=self.device)

            def note(_: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
                found.append(arguments)
                return hidden

            internals.run_body(self.body, blank, *self._masks(rows), note)
            if key:
                if len(self._arguments) > 8:
                    self._arguments.clear()
                self._arguments[key] = found
        return found[index]

    def call(self, index: int, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        """Layer `index` on hidden [n, S, H] of the blocks `rows`."""
        out = self.body.layers[index](hidden, **self.arguments(index, rows))
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, ffn: Callable[..., Tensor] | None = None) -> Tensor:
        """Layer `index` on all blocks [N, S, H] -> [N, S, H]; `ffn` stands in for its FFN."""
        out = torch.empty_like(hidden)
        replaced = {self.neurons(index): ffn} if ffn else {}
        for rows in self.chunks():
            with internals.forwards(replaced):
                out[rows] = self.call(index, hidden[rows], rows)
        return out

    def ffn(self, index: int) -> Any:
        """The FFN module of a layer."""
        return self.body.layers[index].get_submodule(self.card.ffn)

    def neurons(self, index: int) -> Any:
        """What computes the FFN: the module itself, or the experts inside an MoE wrapper."""
        return self.ffn(index).get_submodule(self.card.experts) if self.card.experts else self.ffn(index)

    @torch.no_grad()
    def before_ffn(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(x [N, S, H], r [N, S, H]): what enters the layer's FFN, and what the layer would return if its FFN wrote zeros."""
        seen: list[Tensor] = []

        def zeros(x: Tensor, *_: Tensor) -> Tensor:
            seen.append(x.reshape(-1, *hidden.shape[1:]))
            return torch.zeros_like(x)

        rest = self.run(index, hidden, zeros)
        return torch.cat(seen), rest

    def final_norms(self) -> nn.ModuleDict:
        """What stands between the last layer and the head."""
        return nn.ModuleDict({name: m for name, m in self.body.named_children() if "norm" in name})

    def multiplier(self) -> float:
        """What the FFN's output is multiplied with when it joins the residual."""
        if self.card.join != "scaled":
            return 1.0
        return float(getattr(self.model.config.get_text_config(), self.card.join_multiplier))
