"""The ways to run experts give the same; what cannot run is refused with the reason."""

import importlib.util

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.families.cards import teacher_cards
from moe2dense.teacher.backends import MEGABLOCKS_HELP, megablocks_available
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats
from tests.teacher.families import FAMILIES, blocks, make

EVEN = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 12, "num_attention_heads": 4}


@pytest.mark.parametrize("name", [n for n, c in sorted(teacher_cards().items()) if c.dispatch == "routed"])
def test_grouped_mm(name, tmp_path):
    sizes = {k: v for k, v in EVEN.items() if k in FAMILIES[name] or k == "hidden_size"}
    reference = make(name, tmp_path, **sizes)
    ids, mask = blocks(reference), torch.ones(4, 23, dtype=torch.long)
    mask[2, 14:] = 0
    teacher = load_teacher(tmp_path, experts="grouped_mm")
    assert teacher.backend == "grouped_mm"
    want = reference(ids, attention_mask=mask).logits[mask.bool()]
    stats = RoutingStats()
    for observers in ([], [stats], []):  # observers see single experts; what is stacked by then is shared with them
        got = teacher.run(ids, attention_mask=mask, observers=observers).logits[mask.bool()]
        assert (got - want).abs().max() <= 1e-4 * max(1.0, want.abs().max())
    other = RoutingStats()
    load_teacher(tmp_path).run(ids, attention_mask=mask, observers=[other], logits=False)
    for i in other.layers:
        assert torch.allclose(stats[i].reap, other[i].reap, atol=1e-5)


def test_auto_streams_on_cpu(tmp_path):
    make("mixtral", tmp_path)
    assert load_teacher(tmp_path, device="cpu").backend == "streamed"


def test_refusals(tmp_path):
    make("mixtral", tmp_path / "odd")
    make("llama4_text", tmp_path / "llama4")
    make("mixtral", tmp_path / "big", vocab_size=200_000)
    with pytest.raises(UserError, match="rows must be multiples of 16 bytes, and the teacher's sizes are 24 and 13"):
        load_teacher(tmp_path / "odd", experts="grouped_mm", device="cpu")
    with pytest.raises(UserError, match="Llama 4 scales its experts' inputs; or use experts='streamed'"):
        load_teacher(tmp_path / "llama4", experts="grouped_mm")
    with pytest.raises(UserError, match=r"needs 38.* MB in memory and at most half of 20 MB .* raise memory"):
        load_teacher(tmp_path / "big", experts="grouped_mm", memory="20MB")


@pytest.mark.skipif(importlib.util.find_spec("megablocks") is not None, reason="megablocks is installed")
def test_megablocks_says_how_to_get_it(tmp_path):
    make("mixtral", tmp_path)
    assert megablocks_available() == MEGABLOCKS_HELP and "\n" not in MEGABLOCKS_HELP
    with pytest.raises(UserError, match=r"megablocks is not installed; .* pip install"):
        load_teacher(tmp_path, experts="megablocks")
