"""The layer-major runtime: a whole macro-batch of hidden states goes through one layer, then the next.

Each layer's weights are read once per macro-batch, so bytes per token = checkpoint / macro-batch and memory holds one layer's
attention, one expert being used and the next being read. The schedule is that of FlexGen (arXiv:2303.06865) for prefill.

A sparse layer runs in two passes, so that any way of joining the residual works: pass 1 stops where the experts are called and keeps
their inputs and routing, the experts are computed one by one over all tokens, pass 2 replays the layer with the finished expert
output in place (attention is not computed again).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.common.counters import count_move
from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.attention import use_attention
from moe2dense.modeling.documents import separated
from moe2dense.modeling.hooks import first_tensor
from moe2dense.modeling.products import count_pass, layer_products
from moe2dense.teacher.backends import ExpertRuntime, run_experts
from moe2dense.teacher.buffers import Arena
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.observer import Observer
from moe2dense.teacher.skeleton import Skeleton
from moe2dense.weights.finite import all_finite

# N blocks, S block length, T = N * S tokens, H hidden size, E experts, K top_k
_ARGUMENT_BYTES = 64_000_000  # of masks and positions, kept for chunks that come again


class _AtExperts(Exception):
    """Ends pass 1 where the experts are called."""


class Stream:
    """Iterate over the layers of one macro-batch; afterwards `.hidden_states` [N, S, H] is the final, normed hidden state.

    expert_cache: bytes of a layer's experts that stay in memory as they were read until the next layer begins.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        layers: Sequence[Layer],
        runtime: ExpertRuntime,
        chunk_tokens: int,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        observers: list[Observer],
        arena: Arena,
        expert_cache: int = 0,
    ):
        self.skeleton, self.ids = skeleton, input_ids
        self.layers, self.runtime, self.chunk_tokens = layers, runtime, chunk_tokens
        self.mask, self.positions = attention_mask, position_ids
        self.observers, self.arena, self.expert_cache = observers, arena, expert_cache
        self.shape = (*input_ids.shape, skeleton.hidden_size)
        self.hidden_states: Tensor | None = None
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.token_mask = real.reshape(-1).bool()
        self._inputs: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        self._arity: dict[nn.Module, int] = {}  # of what a mixer returns; 0 = no tuple
        self._layers = self._run()

    def __iter__(self) -> Iterator[LayerPass]:
        return self._layers

    def __next__(self) -> LayerPass:
        return next(self._layers)

    def close(self) -> None:
        """Stop early; the layer in memory is given back."""
        self._layers.close()

    def chunks(self) -> list[slice]:
        """Return the rows of blocks that are run through a decoder layer at once."""
        n = max(1, self.chunk_tokens // self.shape[1])
        return [slice(a, min(a + n, self.shape[0])) for a in range(0, self.shape[0], n)]

    def _record(self, rows: slice, embeddings: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """Return (arguments of every decoder layer, hidden state before the first) of these blocks."""
        calls: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def note(index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            if index == 0:
                first.append(hidden)
            calls.append(arguments)
            return hidden

        device = self.skeleton.device
        mask = None if self.mask is None else self.mask[rows].to(device)
        positions = None if self.positions is None else self.positions[rows].to(device)
        inputs = {} if positions is None else {"position_ids": positions}
        model = self.skeleton.model
        apart = separated({**inputs, "attention_mask": mask}, model.config, self.skeleton.dtype)
        internals.run_body(self.skeleton.body, embeddings, apart["attention_mask"], positions, note)
        return calls, first[0]

    @torch.no_grad()
    def layer_inputs(self, index: int, rows: slice) -> dict[str, Any]:
        """Return the keyword arguments of decoder layer `index` for these blocks: masks and positions as the family makes them."""
        a, b, _ = rows.indices(self.shape[0])
        plain = self.mask is None and self.positions is None
        way = use_attention(self.skeleton.model, self.skeleton.device)
        key = (way, 0, b - a) if plain else (way, a, b)  # without masks every chunk of one size gets the same arguments
        if key not in self._inputs:
            room = _ARGUMENT_BYTES // (4 * (b - a) * self.shape[1] ** 2)
            if len(self._inputs) >= max(2, room):
                self._inputs.clear()
            blank = torch.zeros(b - a, *self.shape[1:], dtype=self.skeleton.dtype, device=self.skeleton.device)
            self._inputs[key] = self._record(slice(a, b), blank)[0]
        return self._inputs[key][index]

    def _run(self) -> Generator[LayerPass, None, None]:
        """Yield every layer once it is done, its weights still in memory."""
        hidden, other = (self.arena.buffer(n, self.shape, self.skeleton.dtype) for n in ("hidden", "hidden_next"))
        self._embed(hidden)
        for layer in self.layers:
            try:
                layer.load()
                if layer.experts is not None:
                    layer.experts.cache_bytes = self.expert_cache
                layer_pass = self._layer(layer, hidden, other)
                self._check_finite(layer_pass)
                for observer in self.observers:
                    with torch.no_grad():
                        observer.layer(layer_pass)
                yield layer_pass
            finally:
                layer.unload()
            self.arena.release()
            hidden, other = other, hidden
        self._finish(hidden, other)

    def _check_finite(self, layer_pass: LayerPass) -> None:
        """Raise UserError where a layer of finite weights gives a real token NaN or infinity."""
        if all_finite(layer_pass.hidden_out):
            return
        rows = layer_pass.hidden_out.reshape(-1, self.shape[2])
        real = self.token_mask.to(rows.device)
        spoilt = torch.nonzero(real & ~torch.isfinite(rows).all(1)).flatten()
        if len(spoilt):
            block, token = divmod(int(spoilt[0]), self.shape[1])
            raise UserError(
                f"teacher {self.skeleton.path}: layer {layer_pass.index} gives NaN or infinity for {len(spoilt)} of {len(rows)} tokens "
                f"(first at block {block}, token {token}), although its weights are finite; see that config.json fits the weights"
            )

    @torch.no_grad()
    def _embed(self, out: Tensor) -> None:
        """Write what enters the first layer to `out` [N, S, H]."""
        for rows, vectors in zip(self.chunks(), self.skeleton.embeddings(self.ids, self.chunks()), strict=True):
            _, first = self._record(rows, vectors)
            out[rows] = first.to(out.device)

    @torch.no_grad()
    def _finish(self, hidden: Tensor, out: Tensor) -> None:
        """Apply the final norm, by the model's own forward with every layer's output replaced."""
        last = len(self.skeleton.body.layers) - 1
        for rows in self.chunks():
            value = hidden[rows].to(self.skeleton.device)
            done = internals.run_body(
                self.skeleton.body, value, None, None, lambda i, h, _, value=value: value if i == last else h
            )
            out[rows] = done.to(out.device)
        self.hidden_states = out

    @torch.no_grad()
    def _layer(self, layer: Layer, hidden: Tensor, out: Tensor) -> LayerPass:
        """Run one layer on all blocks, from `hidden` to `out` [N, S, H]."""
        flat = (self.shape[0] * self.shape[1], self.shape[2])
        x = self.arena.buffer("x", flat, self.skeleton.dtype)
        y = self.arena.buffer("y", flat, self.skeleton.dtype)
        layer_pass = LayerPass(
            layer.index, layer.sparse, layer.module, lambda rows, i=layer.index: self.layer_inputs(i, rows),
            hidden, out, self.token_mask, x, y, experts=layer.experts, ffns=layer,
        )  # fmt: skip
        products = layer_products(layer.module, self.skeleton.model.config, layer.index, without=layer.routed)
        count_pass(products, self.shape[0], self.shape[1], self.skeleton.device.type)
        if layer.sparse:
            self._before_experts(layer, layer_pass)
            self._experts(layer, layer_pass)
            self._after_experts(layer, layer_pass)
        else:
            self._dense(layer, layer_pass)
        return layer_pass

    def _call(self, layer: Layer, layer_pass: LayerPass, rows: slice) -> Tensor:
        """Return the decoder layer's output [n, S, H] on some blocks."""
        count_move(layer_pass.hidden_in[rows], self.skeleton.device)
        out = layer.module(layer_pass.hidden_in[rows].to(self.skeleton.device), **self.layer_inputs(layer.index, rows))
        return first_tensor(out)

    def _flat(self, rows: slice) -> slice:
        """Return the tokens of some blocks."""
        return slice(rows.start * self.shape[1], rows.stop * self.shape[1])

    def _mixer_buffers(self, layer: Layer) -> dict[nn.Module, Tensor]:
        """Return a buffer [N, S, H] for the output of each mixer of a layer."""
        return {m: self.arena.buffer(f"mixer{i}", self.shape, self.skeleton.dtype) for i, m in enumerate(layer.mixers)}

    def _before_experts(self, layer: Layer, layer_pass: LayerPass) -> None:
        """Pass 1: run every chunk up to its experts, keeping their inputs and routing and what the mixers put out."""
        buffers = self._mixer_buffers(layer)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in self.chunks():
            flat = self._flat(rows)

            def stop(
                x: Tensor, index: Tensor, weights: Tensor, logits: Tensor, flat: slice = flat, rows: slice = rows
            ) -> Tensor:
                layer_pass.x[flat] = x.to(layer_pass.x.device)
                routed = index.cpu(), weights.cpu()
                if self.runtime.resample is not None:
                    routed = self.runtime.resample(self.ids[rows], layer.index, *routed)
                parts.append((logits.cpu(), *routed))
                raise _AtExperts

            replaced = {m: self._recording(m, buffer, rows) for m, buffer in buffers.items()}
            with internals.forwards(replaced), layer.intercept(stop, skip_shared=True):
                try:
                    self._call(layer, layer_pass, rows)
                except _AtExperts:
                    continue
                raise AssertionError(f"layer {layer.index} never called its experts")
        layer_pass.router_logits, layer_pass.top_k_index, layer_pass.top_k_weights = (
            torch.cat(p) for p in zip(*parts, strict=True)
        )

    def _experts(self, layer: Layer, layer_pass: LayerPass) -> None:
        """Compute the routed experts over all tokens."""
        watching = [o for o in self.observers if o.wants_experts()]

        def tell_observers(e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
            for observer in watching:
                observer.expert(layer_pass, e, rows, weights, hidden, output)

        layer_pass.y.zero_()
        run_experts(self.runtime, layer, layer_pass, tell_observers if watching else None)

    def _after_experts(self, layer: Layer, layer_pass: LayerPass) -> None:
        """Pass 2: replay every chunk with its mixers' outputs and the finished output of the experts."""
        for rows in self.chunks():
            flat = self._flat(rows)
            count_move(layer_pass.y[flat], self.skeleton.device)
            finished = layer_pass.y[flat].to(self.skeleton.device, copy=True)
            replaced = {m: self._replaying(m, buffer, rows) for m, buffer in self._mixer_buffers(layer).items()}

            def finished_output(*_: Tensor, finished: Tensor = finished) -> Tensor:
                return finished

            with internals.forwards(replaced), layer.intercept(finished_output), layer.output_to(layer_pass.y[flat]):
                layer_pass.hidden_out[rows] = self._call(layer, layer_pass, rows).to(layer_pass.hidden_out.device)

    def _dense(self, layer: Layer, layer_pass: LayerPass) -> None:
        """Run a layer without experts."""
        for rows in self.chunks():
            flat = self._flat(rows)
            with layer.input_to(layer_pass.x[flat]), layer.output_to(layer_pass.y[flat]):
                layer_pass.hidden_out[rows] = self._call(layer, layer_pass, rows).to(layer_pass.hidden_out.device)

    def _recording(self, mixer: nn.Module, buffer: Tensor, rows: slice) -> Callable[..., Any]:
        """Return a mixer's own forward that also keeps its output."""
        forward = mixer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._arity[mixer] = len(out) if isinstance(out, tuple) else 0
            buffer[rows] = first_tensor(out).to(buffer.device)
            return out

        return call

    def _replaying(self, mixer: nn.Module, buffer: Tensor, rows: slice) -> Callable[..., Any]:
        """Return a stand-in for a mixer, with the output that pass 1 kept."""
        arity = self._arity[mixer]

        def call(*_: Any, **__: Any) -> Any:
            first = buffer[rows].to(self.skeleton.device)
            return (first, *[None] * (arity - 1)) if arity else first

        return call
