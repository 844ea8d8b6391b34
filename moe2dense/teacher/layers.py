"""One decoder layer of a teacher: its weights in and out of memory, and hooks where its parts meet."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.gated_ffn import Gating, expert_gating, expert_layout, gated_linears
from moe2dense.modeling.hooks import first_tensor
from moe2dense.teacher.block_scale import BlockScale, measure_block_scale
from moe2dense.teacher.experts import ExpertWeights, LayerExperts, SharedFFN
from moe2dense.teacher.fake_quant import QuantizedExperts
from moe2dense.teacher.parameters import Layout, assign
from moe2dense.teacher.skeleton import Skeleton

# T tokens of a chunk, E experts, K top_k, H hidden
# (x [T, H], index [T, K], weights [T, K], logits [T, E]) -> [T, H]
Handler = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _find(module: Any, path: str) -> Any:
    """Return the submodule or parameter at a dotted path ("": the module itself), or None where there is none."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


class Layer:
    """Layer `index` of a model. `sparse` says whether it has routed experts; `ffn` is the MoE block or the dense FFN."""

    def __init__(self, skeleton: Skeleton, index: int):
        self.skeleton, self.index = skeleton, index
        self.module: nn.Module = skeleton.body.layers[index]
        self.prefix = f"{skeleton.layers_prefix}{index}."
        self.card = card = skeleton.card
        block = _find(self.module, card.moe_block) if card else None
        self.routed: Any = _find(block, card.experts) if card and block is not None else None
        self.sparse = self.routed is not None
        self.ffn: Any = block if block is not None else self._dense_child()
        self.mixers: list[nn.Module] = []
        self.router: Any = None
        self.shared_module: Any = None
        self.shared_inside = True
        self.experts: LayerExperts | None = None
        self.dropless: Any = None  # megablocks' module with this layer's experts
        self.scale = BlockScale()  # of the block on its experts, measured when its router is first in memory
        if self.sparse:
            self._set_up_sparse()
        skip = f"{card.experts_path}." if card and self.sparse else None
        self.names = [n for n in internals.saved_tensors(self.module) if skip is None or not n.startswith(skip)]
        self.loaded = self._measured = False
        self.resident = False  # weights stay in memory once read

    def stay_in_memory(self, keep_experts: bool) -> None:
        """Keep the layer's weights once they are read; the single experts too where they are computed one by one."""
        self.resident = True
        if keep_experts and self.experts is not None:
            self.experts.keep = {}

    def _set_up_sparse(self) -> None:
        """Find router, mixers, experts and shared experts where the card says. Raises UserError where it is wrong."""
        card = self.card
        assert card is not None
        self.mixers = [m for name in card.mixers if (m := _find(self.module, name)) is not None]
        self.router = _find(self.ffn, card.router) or _find(self.module, card.router)
        if self.router is None or not self.mixers:
            part = f"router {card.router!r}" if self.router is None else f"mixers {list(card.mixers)}"
            raise UserError(f"teacher card {card.model_type}: layer {self.index} has no {part}")
        if card.shared:
            self.shared_module = _find(self.ffn, card.shared)
            if self.shared_module is None:
                self.shared_module, self.shared_inside = _find(self.module, card.shared), False
        layout = Layout(*expert_layout(self.routed, card.dispatch == "stacked"))
        kind = QuantizedExperts if self.skeleton.quantize else LayerExperts
        self.experts = kind(
            self.skeleton.weights, f"{self.prefix}{card.experts_path}.", int(self.routed.num_experts), layout,
            expert_gating(self.routed), self.skeleton.dtype,
        )  # fmt: skip
        if isinstance(self.experts, QuantizedExperts):
            self.experts.bits = self.skeleton.quantize
        self.experts.device = self.skeleton.device
        down = self.skeleton.shapes[self.experts.prefix + "down_proj"]
        self.experts.width = down.numel() // (len(self.experts) * self.skeleton.hidden_size)

    def _dense_child(self) -> nn.Module | None:
        """Return the child of a dense layer that is a gated FFN."""
        for child in self.module.children():
            if gated_linears(child) is not None:
                return child
        return None

    # weights

    def load(self) -> None:
        """Read everything but the routed experts."""
        if not self.loaded:
            for name in self.names:
                assign(self.module, name, self.skeleton.converted(self.prefix + name))
            if self.sparse and not self._measured:
                self._measure_scale()
            self.loaded = True

    def _measure_scale(self) -> None:
        """Measure what the block multiplies its experts with. Raises UserError where it does something else with them."""
        assert self.card is not None
        if self.card.dispatch == "routed":
            plain = self.shared_module if self.shared_inside and not self.card.shared_gate else None
            like = torch.empty(self.skeleton.hidden_size, dtype=self.skeleton.dtype, device=self.skeleton.device)
            self.scale = measure_block_scale(self.ffn, self.routed, plain, like)
        self._measured = True

    def unload(self) -> None:
        """Free the weights, unless the whole teacher stays in memory."""
        if self.experts is not None:
            self.experts.forget()
        if self.loaded and not self.resident:
            for name, value in internals.saved_tensors(self.module).items():
                if not value.is_meta:
                    assign(self.module, name, torch.empty_like(value, device="meta"))
            self.loaded = False

    def load_experts(self) -> None:
        """Read all routed experts into their module, stacked as transformers has them, to stay there."""
        assert self.experts is not None and self.resident
        if self.experts.stacked is None:
            prefix = self.experts.prefix.removeprefix(self.prefix)
            for name in (n for n in internals.saved_tensors(self.module) if n.startswith(prefix)):
                assign(self.module, name, self.skeleton.converted(self.prefix + name))
            self.experts.stacked = self.routed

    def unload_experts(self) -> None:
        """Free the stacked experts; they can be read again."""
        assert self.experts is not None
        prefix = self.experts.prefix.removeprefix(self.prefix)
        for name, value in internals.saved_tensors(self.module).items():
            if name.startswith(prefix):
                assign(self.module, name, torch.empty_like(value, device="meta"))
        self.experts.stacked = None

    def grouped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return sum_e w_te f_e(x_t) of x [T, H] by grouped matrix products; index and weights [T, K]."""
        return internals.grouped_experts(self.routed, x, index, weights)

    # parts as plain weights

    def _gated(self, module: nn.Module, what: str) -> ExpertWeights:
        """Return a gated FFN as plain weights, checked on two inputs. Raises UserError where it computes something else."""
        parts = gated_linears(module)
        if parts is None:
            raise UserError(f"layer {self.index} of {self.skeleton.path}: {what} is not a gated feed-forward network")
        gate, down = _find(module, parts.gate), _find(module, parts.down)
        weight, bias = gate.weight, gate.bias
        if parts.up:
            up = _find(module, parts.up)
            g, u, g_bias, u_bias = weight, up.weight, bias, up.bias
        else:
            g, u = weight.chunk(2)
            g_bias, u_bias = bias.chunk(2) if bias is not None else (None, None)
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(2, -1)
        own = first_tensor(module(probe))
        for gating in (parts.gating, *self._experts_gating()):
            weights = ExpertWeights(g, u, down.weight, gating, self.skeleton.dtype, (g_bias, u_bias, down.bias))
            if torch.allclose(weights(probe), own, rtol=1e-2, atol=1e-3):
                return weights
        raise UserError(f"layer {self.index} of {self.skeleton.path}: {what} computes something else than a gated FFN")

    def _experts_gating(self) -> list[Gating]:
        """Return how the model's routed experts are gated, which its dense FFNs may share without saying so; nothing without experts."""
        if self.card is None:
            return []
        every_layer = (_find(layer, self.card.experts_path) for layer in self.skeleton.body.layers)
        return [expert_gating(experts) for experts in every_layer if experts is not None][:1]

    @torch.no_grad()
    def dense(self) -> ExpertWeights:
        """Return the FFN of a dense layer, in memory while the layer is."""
        assert not self.sparse and self.loaded
        return self._gated(self.ffn, "the FFN")

    @torch.no_grad()
    def shared(self) -> list[SharedFFN]:
        """Return the shared experts of a sparse layer, in memory while the layer is."""
        if self.shared_module is None:
            return []
        assert self.loaded and self.card is not None
        gate = None
        if self.card.shared_gate:
            gate = _find(self.ffn, self.card.shared_gate).weight.reshape(-1)
        weights = self._gated(self.shared_module, "the shared expert")
        return [SharedFFN(weights if self.scale.shared == 1.0 else weights.times(self.scale.shared), gate)]

    # hooks

    @contextmanager
    def intercept(self, handler: Handler, skip_shared: bool = False) -> Iterator[None]:
        """Run `handler` in place of the layer's experts within the context. `skip_shared`: the shared expert's output is not needed."""
        assert self.card is not None
        logits: list[Tensor] = []
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        if self.card.dispatch == "stacked":
            replaced[self.ffn] = lambda hidden: self._stacked_block(hidden, handler)
        else:
            replaced[self.routed] = lambda x, index, weights: self._scaled(handler, x, index, weights, logits[-1])
        if skip_shared and self.shared_module is not None:
            replaced[self.shared_module] = torch.zeros_like
        hook = self.router.register_forward_hook(lambda _m, _i, out: logits.append(first_tensor(out)))
        try:
            with internals.forwards(replaced):
                yield
        finally:
            hook.remove()

    def _scaled(self, handler: Handler, x: Tensor, index: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
        """Run a handler whose routing weights hold the block's factor, which the block itself then puts on what is returned."""
        factor = self.scale.routed
        if factor == 1.0:
            return handler(x, index, weights, logits)
        return handler(x, index, weights * factor, logits) / factor

    def _stacked_block(self, hidden: Tensor, handler: Handler) -> tuple[Tensor, Tensor]:
        """Run a block whose experts take every expert's scaled input at once, without making E copies of the tokens."""
        x = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(x)
        index = logits.topk(self.router.top_k, dim=1).indices
        out = handler(x, index, scores.gather(1, index), logits)
        if self.shared_module is not None:
            out = out + self.shared_module(x)
        return out, logits

    @contextmanager
    def input_to(self, target: Tensor) -> Iterator[None]:
        """Copy the FFN's input [T, H] to `target` within the context."""

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            target.copy_(value.reshape(target.shape))

        hook = self.ffn.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def output_to(self, target: Tensor) -> Iterator[None]:
        """Copy the block's output [T, H], shared experts included, to `target` within the context."""
        with ExitStack() as stack:

            def keep(_m: nn.Module, _i: Any, out: Any) -> None:
                target.copy_(first_tensor(out).reshape(target.shape))

            def add(_m: nn.Module, _i: Any, out: Any) -> None:
                target.add_(first_tensor(out).reshape(target.shape).to(target.device))

            stack.callback(self.ffn.register_forward_hook(keep).remove)
            if self.shared_module is not None and not self.shared_inside:
                stack.callback(self.shared_module.register_forward_hook(add).remove)
            yield
