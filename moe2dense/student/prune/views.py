"""View a layer's FFNs in some channels of the residual stream only, without copying them first."""

import torch
from torch import Tensor

from moe2dense.common.devices import by_rows
from moe2dense.common.shared_rows import mean_of_rows
from moe2dense.student.ffn.dense import GatedWeights, Gating
from moe2dense.teacher.experts import ExpertWeights, LayerExperts, SharedFFN
from moe2dense.teacher.layer_pass import LayerPass

# T tokens, H hidden


class CutFFN:
    """The weights of an FFN that reads and writes only the channels `keep`; `scale` multiplies its output."""

    def __init__(self, ffn: GatedWeights, keep: Tensor, scale: float = 1.0):
        self.ffn, self.keep, self.scale = ffn, keep, scale
        self.gate_bias, self.up_bias = ffn.gate_bias, ffn.up_bias
        self.down_bias = None if ffn.down_bias is None else ffn.down_bias[keep] * scale

    @property
    def gating(self) -> Gating:
        return self.ffn.gating

    @property
    def gate(self) -> Tensor:
        return self.ffn.gate[:, self.keep]

    @property
    def up(self) -> Tensor:
        return self.ffn.up[:, self.keep]

    @property
    def down(self) -> Tensor:
        return self.ffn.down[self.keep] * self.scale


class CutExperts:
    """A layer's routed experts in the channels `keep`, read on demand."""

    def __init__(self, experts: LayerExperts, keep: Tensor):
        self.experts, self.keep, self.gating = experts, keep, experts.gating

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> CutFFN:
        return CutFFN(self.experts[expert], self.keep)


class CutLayerFFNs:
    """A layer's other FFNs in the channels `keep`; a shared expert's gate becomes its mean, which scales the output."""

    def __init__(self, layer_pass: LayerPass, keep: Tensor):
        self.layer_pass, self.keep = layer_pass, keep

    def shared(self) -> list[SharedFFN]:
        """Return the shared experts, without gates."""
        scales = [mean_gate(part.gate, self.layer_pass) for part in self.layer_pass.shared]
        parts = zip(self.layer_pass.shared, scales, strict=True)
        return [SharedFFN(CutFFN(p.weights, self.keep, scale)) for p, scale in parts]  # type: ignore[arg-type]

    def dense(self) -> ExpertWeights:
        """Return the FFN of a dense layer."""
        return CutFFN(self.layer_pass.dense, self.keep)  # type: ignore[return-value]  # only its weights are read


def mean_gate(gate: Tensor | None, layer_pass: LayerPass) -> float:
    """Return the mean over the real tokens, of all processes, of a shared expert's sigmoid gate; 1 where it has none."""
    if gate is None:
        return 1.0
    inputs = layer_pass.x[layer_pass.token_mask.to(layer_pass.x.device)].float()
    return float(mean_of_rows(by_rows(lambda x: torch.sigmoid(x @ gate.float()), [inputs], gate.device)))
