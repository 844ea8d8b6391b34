"""Record more of a streamed teacher than its distributions: features of layers, and how tokens were routed."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe2dense.distillation.targets.token_weights import check_token_weights
from moe2dense.errors import UserError
from moe2dense.modeling.attention import eager_attention
from moe2dense.modeling.hooks import asks_for_maps, hook_attention, split_name
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.observer import Observer

# N blocks, S block length, T = N S tokens of a macro-batch, E experts, K top_k, H hidden


class FeatureRecorder(Observer):
    """Keep features of some layers over all macro-batches of a streamed pass: names as in modeling/hooks.py."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype):
        self.dtype = dtype
        self.parts: dict[str, list[Tensor]] = {n: [] for n in names}

    def _keep(self, name: str, value: Tensor) -> None:
        self.parts[name].append(value.detach().to("cpu", self.dtype, copy=True))

    @contextlib.contextmanager
    def attached(self, teacher: Teacher) -> Iterator[None]:
        """Hook the teacher's attention within the context where a feature needs it.

        Raises UserError where the attention has no such part.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(eager_attention(teacher.model.config, asks_for_maps(self.parts)))
            for name in self.parts:
                kind, index = split_name(name)
                if kind != "hidden":
                    handle = hook_attention(teacher.body.layers[index], name, self._keep)
                    stack.callback(handle.remove)
            yield

    def layer(self, layer: LayerPass) -> None:
        """Keep the residual stream after this layer, where asked for."""
        name = f"hidden-{layer.index}"
        if name in self.parts:
            self._keep(name, layer.hidden_out.flatten(0, 1))

    def features(self, blocks: int) -> dict[str, Tensor]:
        """Return the features [N, S, ...] by name. Raises UserError for one that the teacher did not give."""
        if missing := [n for n, parts in self.parts.items() if not parts]:
            raise UserError(f"features: the teacher gives no {missing[0]}")
        for name, parts in self.parts.items():  # one after the other, so that only one of them is there twice
            self.parts[name] = [parts[0] if len(parts) == 1 else torch.cat(parts)]
        return {n: parts[0].unflatten(0, (blocks, -1)) for n, parts in self.parts.items()}


class RoutingRecorder(Observer):
    """Measure how the router and the experts treat each token, averaged over the sparse layers.

    router-entropy: entropy of the router's softmax over all experts, in units of log E: 1 where it cannot decide.
    expert-saliency: sum over the chosen experts of weight * ||output||, relative to the residual stream (REAP's saliency,
    2510.13999, at that token): how much the experts change it.
    """

    def __init__(self, names: Sequence[str]):
        for name in names:
            check_token_weights(name)
        self.names = tuple(names)

    def begin(self, teacher: Teacher, tokens: int) -> None:
        """Start over. Raises UserError for a teacher without experts."""
        if teacher.card is None:
            raise UserError("token weights need a teacher with experts; this one is dense")
        self._last = teacher.config.get_text_config().num_hidden_layers - 1
        self.parts: dict[str, list[Tensor]] = {n: [] for n in self.names}
        self._sums: dict[str, Tensor] = {}
        self._layers = 0
        # [T]: what the experts of the layer that is running add to each token
        self._energy: Tensor | None = None

    def wants_experts(self) -> bool:
        """Return whether single experts' outputs are needed."""
        return "expert-saliency" in self.names

    def expert(self, layer: LayerPass, e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Add what one expert contributes to its tokens."""
        if self._energy is None:
            self._energy = torch.zeros(len(layer.x), dtype=torch.float32)
        self._energy.index_add_(0, rows.cpu(), (weights.float().abs() * output.float().norm(dim=1)).cpu())

    def layer(self, layer: LayerPass) -> None:
        """Add this layer, and close the macro-batch after the last."""
        if layer.sparse:
            self._layers += 1
            if "router-entropy" in self.names:
                assert layer.router_logits is not None
                log_p = layer.router_logits.float().log_softmax(-1)
                self._add("router-entropy", -(log_p.exp() * log_p).sum(-1) / torch.tensor(float(log_p.shape[1])).log())
            if self._energy is not None:
                stream = layer.hidden_in.flatten(0, 1).float().norm(dim=1).cpu()
                self._add("expert-saliency", self._energy / stream.clamp(min=1e-12))
                self._energy = None
        if layer.index == self._last:
            for name in self.names:
                self.parts[name].append(self._sums[name] / self._layers)
            self._sums, self._layers = {}, 0

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def token_weights(self, blocks: int) -> dict[str, Tensor]:
        """Return the weights [N, S] by name."""
        return {n: torch.cat(parts).view(blocks, -1) for n, parts in self.parts.items()}
