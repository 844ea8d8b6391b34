"""Carry the student's own hidden states through its layers while these are being built."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.common.counters import count_move
from moe2dense.families.cards import StudentCard
from moe2dense.modeling import internals
from moe2dense.modeling.attention import mask_use, use_attention
from moe2dense.modeling.documents import separated
from moe2dense.modeling.mask_memory import MaskUse
from moe2dense.modeling.products import count_pass, layer_products
from moe2dense.student.footprint import rows_at_once

# N blocks, S block length, T = N * S tokens, H hidden
_CACHED_CHUNKS = 8


class LayerRunner:
    """Runs a dense host layer by layer on blocks [N, S], its FFN replaced where that is asked for.

    `attention_mask` and `position_ids` are those for transformers; a document begins where positions start again at 0.
    Layers compute on `device`, by default where the model is; hidden states of all blocks are kept on `states`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        card: StudentCard,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        device: torch.device | None = None,
        states: torch.device | None = None,
    ):
        self.model, self.card, self.ids = model, card, input_ids
        self.mask, self.positions = attention_mask, position_ids
        _, self.body = internals.decoder(model)
        embeddings = next(self.body.embed_tokens.parameters())
        self.device, self.dtype = device or embeddings.device, embeddings.dtype
        self.states = states or self.device
        config = model.config.get_text_config()
        self.hidden_size = int(config.hidden_size)
        self.tokens_at_once = rows_at_once(int(getattr(config, card.width)))
        self._arguments: dict[tuple[str, int, int], list[dict[str, Any]]] = {}

    def mask_use(self) -> MaskUse:
        """Return how passes over the blocks make their masks."""
        return mask_use(self.model, self.device, self.ids.shape[1], self.positions is not None)

    def chunks(self) -> list[slice]:
        """Return the rows of blocks that go through a layer at once."""
        n, step = len(self.ids), max(1, self.tokens_at_once // self.ids.shape[1])
        return [slice(a, min(a + step, n)) for a in range(0, n, step)]

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Return [N, S, H]: what enters the first layer."""
        parts: list[Tensor] = []

        def record(index: int, hidden: Tensor, _: dict[str, Any]) -> Tensor:
            if index == 0:
                parts.append(hidden.to(self.states))
            return hidden

        table = next(self.body.embed_tokens.parameters()).device
        for rows in self.chunks():
            vectors = self.body.embed_tokens(self.ids[rows].to(table)).to(self.device)
            internals.run_body(self.body, vectors, *self._masks(rows), record)
        return torch.cat(parts)

    def _masks(self, rows: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
        mask, positions = (None if t is None else t[rows].to(self.device) for t in (self.mask, self.positions))
        return mask, positions

    @torch.no_grad()
    def arguments(self, index: int, rows: slice | Tensor) -> dict[str, Any]:
        """Return the keyword arguments of decoder layer `index` for these blocks, as the family's own forward makes them."""
        plain = self.mask is None and self.positions is None
        way = use_attention(self.model, self.device)
        key = (
            (way, 0, len(self.ids[rows]))
            if plain
            else (way, rows.start, rows.stop)
            if isinstance(rows, slice)
            else None
        )
        if key is None:
            return self._record_arguments(rows)[index]
        if key not in self._arguments:
            if len(self._arguments) > _CACHED_CHUNKS:
                self._arguments.clear()
            self._arguments[key] = self._record_arguments(rows)
        return self._arguments[key][index]

    def _record_arguments(self, rows: slice | Tensor) -> list[dict[str, Any]]:
        """Return the arguments of every layer for these blocks; they do not depend on the hidden states."""
        by_layer: list[dict[str, Any]] = []
        shape = (len(self.ids[rows]), self.ids.shape[1], self.hidden_size)
        blank = torch.zeros(shape, dtype=self.dtype, device=self.device)

        def record(_: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            by_layer.append(arguments)
            return hidden

        mask, positions = self._masks(rows)
        inputs = {} if positions is None else {"position_ids": positions}
        apart = separated({**inputs, "attention_mask": mask}, self.model.config, self.dtype)
        internals.run_body(self.body, blank, apart["attention_mask"], positions, record)
        return by_layer

    def call(self, index: int, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        """Return the output of layer `index` on hidden [n, S, H] of the blocks `rows`, on the device that computes."""
        self._count(index, hidden)
        return self._call(index, hidden, rows)

    def _count(self, index: int, hidden: Tensor, without: nn.Module | None = None) -> None:
        """Count a pass of a layer over hidden [n, S, H], apart from the submodule `without`."""
        products = layer_products(self.body.layers[index], self.model.config, index, without)
        grad = torch.is_grad_enabled() and products.trained > 0
        count_pass(products, len(hidden), hidden.shape[1], self.device.type, grad)

    def _call(self, index: int, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        count_move(hidden, self.device)
        hidden = hidden.to(self.device, non_blocking=True)
        output = self.body.layers[index](hidden, **self.arguments(index, rows))
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, ffn: Callable[..., Tensor] | None = None) -> Tensor:
        """Return the output of layer `index` on all blocks, [N, S, H] -> [N, S, H]; `ffn` stands in for its FFN."""
        output = torch.empty_like(hidden)
        replaced = {self.neurons(index): ffn} if ffn else {}
        self._count(index, hidden, self.neurons(index) if ffn else None)
        for rows in self.chunks():
            with internals.forwards(replaced):
                output[rows] = self._call(index, hidden[rows], rows).to(output.device)
        return output

    def ffn(self, index: int) -> nn.Module:
        """Return the FFN module of a layer."""
        return self.body.layers[index].get_submodule(self.card.ffn)

    def neurons(self, index: int) -> nn.Module:
        """Return the module that computes the FFN: itself, or the experts inside an MoE wrapper."""
        return self.ffn(index).get_submodule(self.card.experts)

    @torch.no_grad()
    def before_ffn(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters a layer's FFN, and what the layer would return if its FFN wrote zeros, both [N, S, H]."""
        inputs: list[Tensor] = []

        def zeros(x: Tensor, *_: Tensor) -> Tensor:
            inputs.append(x.reshape(-1, *hidden.shape[1:]).to(self.states))
            return torch.zeros_like(x)

        rest = self.run(index, hidden, zeros)
        return torch.cat(inputs), rest

    def final_norms(self) -> nn.ModuleDict:
        """Return the norms between the last layer and the head."""
        return nn.ModuleDict({name: m for name, m in self.body.named_children() if "norm" in name})

    def multiplier(self) -> float:
        """Return what the FFN's output is multiplied with when it joins the residual stream."""
        if self.card.join != "scaled":
            return 1.0
        return float(getattr(self.model.config.get_text_config(), self.card.join_multiplier))
