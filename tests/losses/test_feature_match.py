"""Feature losses in several terms: read of real models through hooks, against brute force in float64."""

import itertools
import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.errors import UserError
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.losses.feature_spec import feature_weights, parse_features, teacher_features
from moe2dense.losses.hidden_states import Tokens
from moe2dense.losses.relations import rkd_angle, rkd_distance
from moe2dense.modeling.hooks import captured, feature_name

SIZES = dict(vocab_size=61, intermediate_size=16, max_position_embeddings=32)
IDS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(0))


def make_model(seed, **sizes):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**SIZES, **sizes)).double().eval()


@pytest.fixture(scope="module")
def models():
    student = make_model(0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    teacher = make_model(1, hidden_size=24, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3)
    return student, teacher


def both(text, models, counted=None, documents=None):
    """(total, plain sum) of a text on both models."""
    student, teacher = models
    match = FeatureMatch(text, (2, 16), (4, 24), 2).double()
    inputs = {"input_ids": IDS}
    seen = torch.ones(3, 9, 9, dtype=torch.bool).tril()
    if documents is not None:
        inputs["position_ids"] = documents
        own = (documents == 0).cumsum(1)
        seen &= own[:, :, None] == own[:, None, :]
    with captured(student, match.student_features) as s:
        student.model(**inputs)
    with captured(teacher, match.teacher_features) as t, torch.no_grad():
        teacher.model(**inputs)
    counted = torch.ones(3, 9, dtype=torch.bool) if counted is None else counted
    weights = counted.flatten().double() / counted.sum()
    return match(s, t, Tokens(weights, lambda: seen), [1.0] * len(match.terms)), s, t


def test_captured_features_are_the_models_own(models):
    _, teacher = models
    own = teacher(IDS, output_hidden_states=True)
    before, hooks = teacher.config._attn_implementation, [len(m._forward_hooks) for m in teacher.modules()]
    with captured(teacher, ("hidden-1", "maps-2", "query-0", "value-3")) as features:
        teacher.model(IDS)
    assert teacher.config._attn_implementation == before
    assert [len(m._forward_hooks) for m in teacher.modules()] == hooks
    torch.testing.assert_close(features["hidden-1"], own.hidden_states[2].flatten(0, 1))
    assert features["maps-2"].shape == (27, 6, 9) and features["value-3"].shape == (27, 12)
    torch.testing.assert_close(features["maps-2"].sum(-1), torch.ones(27, 6).double())
    layer = teacher.model.layers[0]
    query = layer.self_attn.q_proj(layer.input_layernorm(teacher.model.embed_tokens(IDS)))
    torch.testing.assert_close(features["query-0"], query.flatten(0, 1))
    assert feature_name(3) == "hidden-3"
    for wrong in ("hidden", "maps-x", "logits-2"):
        with pytest.raises(UserError, match="must be KIND-LAYER"):
            feature_name(wrong)


def test_attention_against_loops(models):
    counted = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    (total, plain), s, t = both("attention:0=1,1=3", models, counted)
    expected = 0.0
    for (a, b), n, h, i in itertools.product(((0, 1), (1, 3)), range(3), range(2), range(9)):
        if counted[n, i]:
            p = t[f"maps-{b}"][9 * n + i, 3 * h : 3 * h + 3, : i + 1].mean(0)
            expected += (p * (p / s[f"maps-{a}"][9 * n + i, h, : i + 1]).log()).sum()
    expected = expected / (2 * 2 * counted.sum())
    torch.testing.assert_close(total, expected)
    assert plain.item() == pytest.approx(expected.item())


def test_relations_against_loops(models):
    counted = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, 9)
    (total, _), s, t = both("relation:last", models, counted, positions)
    expected = 0.0
    for what, n, i in itertools.product(("query", "key", "value"), range(3), range(9)):
        if not counted[n, i]:
            continue
        own, goal = s[f"{what}-1"][9 * n : 9 * n + 9], t[f"{what}-3"][9 * n : 9 * n + 9]
        heads = math.gcd(2, own.shape[1], goal.shape[1])
        seen = range(i + 1) if i < 4 else range(4, i + 1)
        for h in range(heads):
            a, b = (x.chunk(heads, 1)[h] for x in (own, goal))
            q, p = (torch.stack([x[i] @ x[j] for j in seen]).div(x.shape[1] ** 0.5).softmax(-1) for x in (a, b))
            expected += (p * (p / q).log()).sum() / heads
    torch.testing.assert_close(total, expected / (3 * counted.sum()))


@pytest.mark.parametrize("kind", ["rkd", "rkd-distance", "rkd-angle"])
def test_rkd_within_each_block(models, kind):
    counted = torch.ones(3, 9, dtype=torch.bool)
    counted[1, 2:] = False  # too few for a triangle
    counted[2, :4] = False
    (total, _), s, t = both(f"{kind}:0=2", models, counted)
    expected = 0.0
    for n in (0, 2):
        a, b = (x[9 * n : 9 * n + 9][counted[n]] for x in (s["hidden-0"], t["hidden-2"]))
        loss = {"rkd-distance": rkd_distance(a, b), "rkd-angle": rkd_angle(a, b)}
        loss["rkd"] = loss["rkd-distance"] + 2 * loss["rkd-angle"]
        expected = expected + loss[kind] * counted[n].sum() / counted.sum()
    torch.testing.assert_close(total, expected)
    assert torch.autograd.grad(total, models[0].model.embed_tokens.weight)[0].isfinite().all()


def test_terms_add_up_with_their_weights(models):
    torch.manual_seed(3)
    _, s, t = both("mse:last+attention:last+rkd:last", models)
    tokens = Tokens(torch.full((27,), 1 / 27, dtype=torch.float64), lambda: torch.ones(3, 9, 9).bool().tril())
    match = FeatureMatch("mse:last+attention:last+rkd:last", (2, 16), (4, 24), 2).double()
    alone = [term(s, t, tokens).item() for term in match.terms]
    total, plain = match(s, t, tokens, (0.5, 0.0, 2.0))
    assert total.item() == pytest.approx(0.5 * alone[0] + 2 * alone[2])
    assert plain.item() == pytest.approx(alone[0] + alone[2])


def test_what_is_written_is_what_is_read():
    terms = parse_features("mse:uniform@0.1+attention:last:2@linear:1:0+rkd")
    assert [(f.kind, f.layer_map, f.weight) for f in terms] == [
        ("mse", "uniform", "0.1"), ("attention", "last:2", "linear:1:0"), ("rkd", "uniform", "")
    ]  # fmt: skip
    assert feature_weights("mse+attention@linear:1:0", "0.5", 10, 11) == (0.5, 0.0)
    assert feature_weights("mse@linear:1:0", "0.5", 10, 11) == () == feature_weights("", "1", 0, 2)
    names = teacher_features("mse:last+attention:0=3+relation:last", 2, 4)
    assert names == ("hidden-3", "maps-3", "query-3", "key-3", "value-3")
    assert teacher_features("cosine:learned", 2, 3) == ("hidden-0", "hidden-1", "hidden-2")
    for wrong, why in (
        ("l2", "must be KIND:MAP"), ("atention:last", "did you mean 'attention'"), ("attention:learned", "learned map"),
        ("mse@often", "schedule"), ("", "must be KIND:MAP"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            parse_features(wrong)


def test_fused_attention_is_refused():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(
        Phi3Config(**SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    )  # fmt: skip
    with pytest.raises(UserError, match="layer 1 has no q_proj"), captured(model, ("query-1",)):
        pass
