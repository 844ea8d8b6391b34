"""Features and routing recorded while the teacher streams, against the same model of transformers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.formats import read_features, write_features
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.token_weights import TOKEN_WEIGHTS, normalized
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher

NAMES = ("hidden-1", "maps-0", "maps-1", "query-1", "key-0", "value-1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same model as transformers has it and as a Teacher that streams three blocks at a time."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=67, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=13, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    teacher = load_teacher(folder)
    teacher.plan = teacher.plan.__class__(**{**vars(teacher.plan), "macro_batch": 27})
    return model, teacher


@pytest.fixture(scope="module")
def text():
    return Blocks(torch.randint(0, 67, (7, 9), generator=torch.Generator().manual_seed(0)))


def test_features_equal_the_models_own(pair, text):
    resident, streamed = (hidden_targets(m, text, features=NAMES) for m in pair)
    assert list(streamed.features) == list(NAMES)
    for name in NAMES:
        torch.testing.assert_close(streamed.features[name], resident.features[name], rtol=1e-4, atol=1e-5, msg=name)
    rows = streamed.batch([5, 2])
    assert rows.features["maps-0"].shape == (18, 4, 9) and rows.features["value-1"].shape == (18, 12)
    torch.testing.assert_close(rows.features["key-0"][9:], resident.features["key-0"][2], rtol=1e-4, atol=1e-5)
    own = [len(m._forward_hooks) for m in pair[1].model.modules()]
    assert sum(own) == 0 and pair[1].model.config._attn_implementation == "sdpa"


def test_features_with_documents_and_padding(pair):
    ids = torch.randint(0, 67, (5, 9), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(9) >= 4).int().expand(5, 9)
    resident, streamed = (hidden_targets(m, Blocks(ids, document_ids=documents), features=NAMES) for m in pair)
    for name in NAMES:
        torch.testing.assert_close(streamed.features[name], resident.features[name], rtol=1e-4, atol=1e-5, msg=name)
    assert streamed.features["maps-1"][0, 6, :, :4].abs().max() == 0


def test_stored_features_are_close(pair, text, tmp_path):
    known = hidden_targets(pair[0], text, features=NAMES)
    stored = open_targets(write_targets(pair[1], text, tmp_path, features=NAMES), text).batch([3])
    for name in NAMES:
        error = (stored.features[name] - known.features[name][3]).norm() / known.features[name][3].norm()
        assert error < 0.01, name
    torch.testing.assert_close(stored.features["maps-0"].sum(-1), torch.ones(9, 4))


def brute_force(model, ids):
    """[N, S] of both names, expert by expert, in float64."""
    model, entropy, saliency = model.double(), 0.0, 0.0
    inputs = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _m, a, i=i: inputs.__setitem__(i, a[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    states = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(model.model.layers):
        x, block = inputs[i], layer.mlp
        p = (x @ block.gate.weight.T).softmax(-1)
        entropy = entropy - (p * p.log()).sum(-1) / torch.tensor(5.0).double().log() / 2
        top = p.topk(2)
        added = 0.0
        for k in range(2):
            for e in range(5):
                gate, up = block.experts.gate_up_proj[e].chunk(2)
                out = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ block.experts.down_proj[e].T
                weight = top.values[..., k] / top.values.sum(-1)
                added = added + torch.where(top.indices[..., k] == e, weight * out.norm(dim=-1), 0.0)
        saliency = saliency + added / states[i].norm(dim=-1) / 2
    model.float()
    return {"router-entropy": entropy.detach(), "expert-saliency": saliency.detach()}


def test_routing_against_brute_force(pair, text, tmp_path):
    model, teacher = pair
    expected, recorded = (
        brute_force(model, text.input_ids),
        hidden_targets(teacher, text, routing=TOKEN_WEIGHTS).routing,
    )
    for name in TOKEN_WEIGHTS:
        torch.testing.assert_close(recorded[name].double(), expected[name], rtol=1e-4, atol=1e-5)
    write_targets(teacher, text, tmp_path, "sampled", routing=["expert-saliency"])
    stored = open_targets(tmp_path, text[[6, 1]])
    torch.testing.assert_close(
        stored.token_weights("expert-saliency").double(), expected["expert-saliency"][[6, 1]], rtol=2e-3, atol=1e-3
    )
    with pytest.raises(UserError, match="hold no router-entropy; write them again with --token-weights"):
        stored.token_weights("router-entropy")


def test_token_weights_have_mean_one_where_they_count():
    values, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    weights = normalized(values, mask)
    assert weights[mask].mean().item() == pytest.approx(1) and weights[0, 2] == 0
    assert (weights[1, 1] / weights[0, 0]).item() == pytest.approx(4)
    with pytest.raises(UserError, match="0 on every token"):
        normalized(torch.zeros(2, 3), mask)


def test_what_the_teacher_cannot_give_is_refused(pair, text):
    with pytest.raises(UserError, match="router of a streamed teacher"):
        hidden_targets(pair[0], text, routing=["router-entropy"])
    with pytest.raises(UserError, match="did you mean 'router-entropy'"):
        hidden_targets(pair[1], text, routing=["router-entropie"])


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_training_weighs_tokens_alike_from_memory_and_store(pair, text, tmp_path, name):
    from moe2dense.config.training import TrainConfig
    from moe2dense.distillation.api import distill

    model, teacher = pair
    config = TrainConfig(batch=36, micro_batch=2, lr=1e-30, token_weights=name, epochs=4.0)
    stored = open_targets(write_targets(teacher, text, tmp_path, routing=[name]), text)
    torch.manual_seed(5)
    config_s = MixtralConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})
    student = MixtralForCausalLM._from_config(config_s, experts_implementation="eager").eval()
    with torch.no_grad():
        p, log_q = model(text.input_ids).logits.log_softmax(-1), student(text.input_ids).logits.log_softmax(-1)
    kl = (p.exp() * (p - log_q)).sum(-1)
    weights = brute_force(model, text.input_ids)[name].float()
    expected = (kl * weights / weights.mean()).mean()
    for source in ({"teacher": teacher}, {"targets": stored}):
        history = distill(student, data=text, config=config, **source).history
        kds = [r["parts"]["kd"] for r in history]  # seven passes of four blocks see each block four times
        assert len(kds) == 7 and sum(kds) / 7 == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("channels", [64, 193, 200])
def test_an_outlier_channel_costs_the_others_no_digits(channels, tmp_path):
    """Massive activations: one channel a thousand times larger than the rest, in 8 bits."""
    states = torch.randn(2, 9, channels, generator=torch.Generator().manual_seed(4))
    states[..., 70 % channels] = 1000.0
    save_file(write_features({"hidden-1": states}), tmp_path / "shard.safetensors")
    with safe_open(str(tmp_path / "shard.safetensors"), "pt") as shard:
        values = torch.stack([read_features(shard, row, ["hidden-1"])["hidden-1"] for row in range(2)])
    beyond = torch.arange(channels) // 64 != (70 % channels) // 64
    error = (values - states)[..., beyond].norm() / states[..., beyond].norm().clamp_min(1e-9)
    assert values.shape == states.shape and error < 0.01
    assert (values - states)[..., 70 % channels].abs().max() < 5


@pytest.mark.parametrize(("features", "part"), [((), 3), (("hidden-0", "hidden-1"), 1)])
def test_a_teacher_in_memory_answers_as_many_blocks_as_fit(pair, text, tmp_path, features, part):
    """Three blocks share a reading, of which it holds five copies; the states of two layers and one more copy leave room for one."""
    teacher = pair[1]
    assert teacher.resident
    write_targets(teacher, text, tmp_path / "t", features=features)
    assert json.loads((tmp_path / "t" / "store.json").read_text())["part"] == part
    stored = open_targets(tmp_path / "t", text).batch(list(range(len(text)))).hidden.float()
    whole = hidden_targets(teacher, text).hidden.flatten(0, 1)
    torch.testing.assert_close(stored, whole, rtol=0.01, atol=0.01)  # kept in bfloat16
