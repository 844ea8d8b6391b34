import pytest
import torch

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.analyze import analyze_targets, soft_label_numbers
from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import SampledRows
from moe2dense.modeling.head import Head


def test_numbers_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]).double()
    logits[1] = logits[1].log()
    numbers = soft_label_numbers(logits, torch.tensor([2, 0]))
    assert numbers["entropy"][0].item() == pytest.approx(torch.tensor(4.0).log().item())
    assert numbers["nll"].tolist() == pytest.approx([1.3862944, 0.3566749])
    assert numbers["top1_mass"].tolist() == pytest.approx([0.25, 0.7]) and numbers[
        "top5_mass"
    ].tolist() == pytest.approx([1, 1])
    assert numbers["dark"].tolist() == pytest.approx([0.75, 0.3]) and numbers["top1_is_label"][1] == 1


def test_means_by_domain_and_examples():
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 6, 8), Head(torch.randn(50, 8))
    blocks = Blocks(torch.randint(0, 50, (4, 6)), ["a", "b", "a", ""])
    analysis = analyze_targets(HiddenTargets(hidden, head), blocks, decode=lambda ids: " ".join(map(str, ids)))
    log_p = head.logits(hidden).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    nll = -log_p[:, :-1].gather(2, blocks.input_ids[:, 1:, None])[..., 0]
    assert analysis["all"]["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert analysis["all"]["information"] == pytest.approx((nll - entropy).mean().item(), rel=1e-4)
    assert analysis["domains"].keys() == {"a", "b", "(none)"} and analysis["domains"]["a"]["tokens"] == 10
    assert analysis["domains"]["a"]["entropy"] == pytest.approx(entropy[[0, 2]].mean().item(), rel=1e-5)
    block, place = divmod(int(entropy.argmax()), 5)
    first = analysis["examples"][0]
    assert (first["block"], first["position"]) == (block, place)
    assert first["label"] == str(int(blocks.input_ids[block, place + 1]))
    assert first["expected"][0] == (
        str(int(log_p[block, place].argmax())),
        pytest.approx(log_p[block, place].exp().max().item()),
    )


def test_partial_targets_are_refused():
    class Part:
        def batch(self, indices):
            return SampledRows(torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2), torch.zeros(6))

    with pytest.raises(UserError, match="needs `hidden` or `full`"):
        analyze_targets(Part(), Blocks(torch.zeros(1, 6, dtype=torch.int64)))
