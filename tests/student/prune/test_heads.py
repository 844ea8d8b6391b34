"""Students with fewer attention heads: scores against brute force, exact cuts in every family whose heads can be cut."""

import pytest
import torch

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.prune.cut import importance
from moe2dense.student.prune.heads import HeadEnergy, best_heads
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.pruned import Sizes, head_shapes, pruned_shape, pruning_text
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, blocks, make

CUTTABLE = sorted(f for f in FAMILIES if student_host(teacher_cards()[f].host).heads)
SIZES = {f: {"num_attention_heads": 6, "num_key_value_heads": 3} for f in CUTTABLE}
SIZES |= {f: {"num_attention_heads": 4, "num_key_value_heads": 4} for f in CUTTABLE if "kv_lora_rank" in FAMILIES[f]}


def target_for(teacher, width: int = 0, **geometry) -> Target:
    card, config = student_host(teacher.card.host), teacher.config.get_text_config()
    shape = teacher_geometry(config, teacher.card)
    width = width or max(shape.expert_width + shape.shared_width, shape.dense_width)
    return Target("test", "test", card, width, dense_config(config, card, width, **geometry), 0, shape, dict(geometry))


def test_energy_is_what_heads_write_on_real_tokens(tmp_path):
    model = make("mixtral", tmp_path, num_attention_heads=6, num_key_value_heads=3)
    ids, mask = blocks(model, n=3, s=11), torch.ones(3, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, attention_mask=mask)
    teacher = load_teacher(tmp_path, experts="streamed")
    observer = HeadEnergy(6, student_host("mistral").heads)
    importance(teacher, Blocks(ids, attention_mask=mask), observer)
    for index, z in enumerate(seen):
        weight = model.model.layers[index].self_attn.o_proj.weight
        each = z[mask.bool()].view(-1, 6, 4).double()
        want = [float((each[:, a] @ weight[:, 4 * a : 4 * a + 4].double().T).pow(2).sum()) for a in range(6)]
        torch.testing.assert_close(observer.energy[index], torch.tensor(want).double(), rtol=1e-4, atol=1e-6)
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in teacher.body.layers)


def test_whole_groups_stay_with_as_many_heads_each():
    energy = torch.tensor([1.0, 9, 5, 5, 0, 2, 7, 8])  # 4 groups of 2
    kept = best_heads(energy, 4, 4, 2)
    assert kept.group.tolist() == [0, 3] or kept.group.tolist() == [1, 3]  # 10 and 10 tie behind 15
    one_each = best_heads(energy, 4, 3, 3)
    assert one_each.group.tolist() == [0, 1, 3] and one_each.query.tolist()[::2] == [1, 7]
    rules = {"q": "query rows", "k": "group rows", "o": "query columns"}
    value = torch.arange(24.0).view(24, 1).expand(24, 24)
    assert one_each.cut("q.weight", value, rules)[:3, 0].tolist() == [3, 4, 5]
    assert one_each.cut("k.bias", torch.arange(8.0), rules).tolist() == [0, 1, 2, 3, 6, 7]
    assert one_each.cut("o.weight", value.T, rules).shape == (24, 9) and one_each.cut(
        "o.bias", value[0], rules
    ).shape == (24,)
    assert one_each.cut("qk_norm.weight", value, rules) is value  # no rule


@pytest.mark.parametrize("family", CUTTABLE)
def test_dropping_heads_that_write_nothing_is_exact(family, tmp_path):
    """A KV group, and one query head more where groups share keys, write nothing in each layer: the student without them computes the same."""
    model = make(family, tmp_path / "t", **SIZES[family])
    path, heads = (
        next(p for p, k in student_host(teacher_cards()[family].host).heads.items() if k == "query columns"),
        model.config.num_attention_heads,
    )
    groups = model.config.num_key_value_heads
    each = heads // groups
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        if getattr(layer, "self_attn", None) is None:
            continue
        weight = layer.get_submodule(path).weight
        by_head = weight.view(weight.shape[0], groups, each, -1)
        by_head[:, int(torch.randint(groups, (1,), generator=generator))] = 0
        if each > 1:
            for g in range(groups):
                by_head[:, g, int(torch.randint(each, (1,), generator=generator))] = 0
    for name, value in model.named_parameters():  # identical experts, so that nothing else differs
        if ".experts." in name and value.dim() > 1:
            value.copy_(value[:1].expand_as(value).clone())
        if "shared_expert_gate" in name:
            value.zero_()
    model.save_pretrained(tmp_path / "d")
    teacher, ids = load_teacher(tmp_path / "d", experts="streamed"), blocks(model)
    changes = {"num_attention_heads": groups - 1, "num_key_value_heads": groups - 1}
    whole, cut = (
        build_student(teacher, target_for(teacher, **g), Blocks(ids), init="weighted-average").model
        for g in ({}, changes)
    )
    assert cut.config.num_attention_heads == groups - 1
    with torch.no_grad():
        torch.testing.assert_close(cut(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-3)


def test_counts_from_a_few_models_are_those_of_any_model(tmp_path):
    for family in ("mixtral", "lfm2_moe", "qwen3_next"):
        model = make(family, tmp_path / family)
        config, host = model.config, student_host(teacher_cards()[family].host)
        sizes = Sizes(config, host, {}, [24, 20, 16, 12, 8])
        for depth, channels, width in ((2, 20, 37), (3, 12, 64), (1, 8, 100)):
            got = dense_config(config, host, width, hidden_size=channels, num_hidden_layers=depth)
            from moe2dense.modeling.empty import count_parameters, empty_model

            total = count_parameters(empty_model(got))
            assert (
                sizes.width(total, depth, channels)
                == width // 32 * 32
                > sizes.width(total - 1, depth, channels) - (width % 32 > 0)
            )


def test_shapes_of_the_tiny_teacher(tiny):
    teacher = load_teacher(tiny)
    shape = teacher_geometry(teacher.config, teacher.card)
    assert head_shapes(shape) == [(6, 3), (4, 2), (3, 3)]
    kept = {}
    for prune in ("width", "depth", "heads"):
        for to in ("40%", "25%"):
            target = resolve_target(to, teacher.config, teacher.card, prune)
            assert target.parameters <= 1.05 * float(to[:-1]) / 100 * shape.parameters
            kept[prune, to] = pruning_text(shape, target.geometry, "influence")
    assert kept["depth", "40%"] == "2 of 4 layers (by influence)"
    assert kept["width", "25%"] == "96 of 192 channels (by mean activation)"
    assert (
        kept["heads", "25%"].endswith("3 of 6 heads in 3 of 3 KV groups (by output energy)")
        and "channels" in kept["heads", "25%"]
    )
    with pytest.raises(UserError, match="norms run over all heads"):
        pruned_shape(10**6, teacher.config, shape, student_host("olmo2"), "heads")
    with pytest.raises(UserError, match=r"build\.prune is 'tails'"):
        resolve_target("25%", teacher.config, teacher.card, "tails")
