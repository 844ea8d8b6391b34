"""What an MoE block multiplies its experts with is measured; a block that does more with them is refused."""

import pytest
import torch
from torch import nn

from moe2dense.errors import UserError
from moe2dense.teacher.block_scale import measure_block_scale


class Block(nn.Module):
    """after(a * experts(x) + b * shared(x)), as blocks of transformers are put together."""

    def __init__(self, a, b, after=None):
        super().__init__()
        self.experts, self.shared, self.after = nn.Identity(), nn.Identity(), after or nn.Identity()
        self.a, self.b = a, b

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        return self.after((self.a * self.experts(flat) + self.b * self.shared(flat)).view(x.shape)), None


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.826, 1.0), (0.5, 0.5), (1.0, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_on_experts_and_shared_ffn(a, b, dtype):
    block = Block(a, b)
    scale = measure_block_scale(block, block.experts, block.shared, torch.empty(7, dtype=dtype))
    assert scale.routed == pytest.approx(a, rel=1e-6 if dtype == torch.float32 else 4e-3)
    assert scale.shared == pytest.approx(b, rel=1e-6 if dtype == torch.float32 else 4e-3)
    assert (scale.routed == 1.0) == (a == 1.0)
    assert "forward" not in block.experts.__dict__


def test_a_norm_on_the_sum_is_no_factor():
    block = Block(1.0, 1.0, nn.RMSNorm(7))
    with pytest.raises(UserError, match="does more with the sum of its experts than multiply it"):
        measure_block_scale(block, block.experts, block.shared, torch.empty(7))
