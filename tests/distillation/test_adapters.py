"""Adapters reach every FFN of every host, and merging leaves plain weights that compute the same."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation import adapters
from moe2dense.distillation.adapters import adapter_targets, add_adapters, merge_adapters
from moe2dense.distillation.optimizers import make_optimizer
from moe2dense.distillation.setup import check_documents
from moe2dense.errors import UserError
from moe2dense.families.cards import student_cards, student_host, teacher_cards
from moe2dense.student.target.dense_config import dense_config
from tests.teacher.families import FAMILIES, tiny_sizes

HOSTS = {teacher_cards()[family].host: family for family in sorted(FAMILIES)}
CONFIG = TrainConfig(lora=3, lr=1e-2)


def host_model(host: str, **changes):
    """A random student of the host; changes: sizes of the family's row, where it has them."""
    family = HOSTS[host]
    changes = {name: size for name, size in changes.items() if name in FAMILIES[family]}
    config = AutoConfig.for_model(family, **tiny_sizes(family, **changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(dense_config(config, student_host(host), 12), dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


def ffn_weights(model, host: str) -> dict[str, torch.Tensor]:
    """The matrices of the FFNs, by the paths that the host's card names."""
    card = student_host(host)
    paths = ("gate_up_proj", "down_proj") if card.moe_shaped else tuple(filter(None, (card.gate, card.up, card.down)))
    inside = f".{card.ffn}." + (f"{card.experts}." if card.experts else "")
    names = [n for n, _ in model.named_parameters() if inside in n and n.removesuffix(".weight").endswith(paths)]
    return {name: model.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_a_step_changes_every_ffn_and_merging_keeps_the_logits(host):
    model = host_model(host)
    before, original, kind = ffn_weights(model, host), copy.deepcopy(model), model.config.model_type
    assert len(before) == model.config.num_hidden_layers * (
        2 if student_host(host).moe_shaped or not student_host(host).up else 3
    )
    adapted = add_adapters(model, CONFIG)
    assert adapted.config.model_type == kind
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)
    ids = torch.randint(3, 101, (2, 13), generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer(adapted, CONFIG)
    for _ in range(2):  # after the first step only one factor of each adapter has moved
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        want = adapted.eval()(input_ids=ids).logits
        merged = merge_adapters(adapted)
        assert merged is model and merged.state_dict().keys() == original.state_dict().keys()
        torch.testing.assert_close(merged(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    after = ffn_weights(merged, host)
    unchanged = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert unchanged == []
    for name, value in merged.named_parameters():
        if any(part in name for part in ("norm", "router", "embed", "lm_head", ".gate.weight")):
            assert torch.equal(value, original.get_parameter(name)), name


def test_every_host_of_a_family_is_here():
    alone = {name for name, card in student_cards().items() if not card.host} - HOSTS.keys()
    assert alone == {"youtu"}  # chosen by name only; their FFNs are linears as in mistral


def test_an_ffn_without_adapters_is_refused(monkeypatch):
    model = host_model("glm4_moe")
    monkeypatch.setattr(adapters, "get_peft_model", lambda m, c: m.requires_grad_(False))
    with pytest.raises(
        UserError, match=r"no adapter on model\.layers\.0\.mlp\.gate_proj \(9 of the FFNs' 9 matrices\)"
    ):
        add_adapters(model, CONFIG)


def test_dora_is_refused_where_peft_has_none():
    assert adapter_targets(host_model("gpt_oss")).parameters[:2] == (
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    )
    with pytest.raises(UserError, match=r"train\.dora: GptOssForCausalLM keeps its FFN as parameters of experts"):
        add_adapters(host_model("gpt_oss"), TrainConfig(lora=3, dora=True))


def test_packed_documents_are_refused_before_training_where_state_is_carried():
    model = host_model("lfm2")
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(UserError, match="lfm2 carries state across document borders"):
        check_documents(model, Blocks(torch.arange(3, 8)[None], document_ids=documents))
    check_documents(model, Blocks(torch.arange(3, 8)[None], document_ids=torch.zeros_like(documents)))
