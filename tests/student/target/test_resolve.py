import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.errors import UserError
from moe2dense.families.cards import find_checkpoint, student_host, teacher_cards
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.target.dense_config import dense_config, tensor_map
from moe2dense.student.target.resolve import resolve_target, width_for, width_line


@pytest.fixture(scope="module")
def mixtral():
    card, row = find_checkpoint("mixtral")
    return AutoConfig.for_model(card.model_type, **row.config), card


@pytest.fixture(scope="module")
def tiny_config(tiny):
    return AutoConfig.from_pretrained(tiny)


def test_mixtral_to_7b_is_mistral_7b(mixtral):
    target = resolve_target("7b", *mixtral)
    assert target.parameters == 7_241_732_096
    assert (target.width, target.whole_experts) == (14336, 1.0)
    reference = AutoConfig.for_model("mistral", vocab_size=32000)  # the class defaults are Mistral-7B's
    assert count_parameters(empty_model(reference)) == target.parameters
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert getattr(target.config, name) == getattr(reference, name)
    assert target.config.rope_parameters["rope_theta"] == 1e6
    assert target.config.architectures == ["MistralForCausalLM"]


def test_mixtral_to_13b_is_two_experts(mixtral):
    assert resolve_target("13b", *mixtral).whole_experts == 2


def test_geometry(mixtral):
    shape = teacher_geometry(*mixtral)
    assert shape.parameters == 46_702_792_704
    assert shape.active_parameters == 12_879_925_248
    assert shape.active_width == 2 * 14336
    assert shape.moe_layers == tuple(range(32))


@pytest.mark.parametrize(("to", "width"), [("3.2m", 512), ("2.6m", 256), ("40%", 256), ("47%", 512), ("3m", 384)])
def test_tiny_widths(tiny_config, to, width):
    target = resolve_target(to, tiny_config, teacher_cards()["mixtral"])
    assert target.width == width
    assert target.parameters == count_parameters(empty_model(target.config))


def test_size_is_linear_in_width(tiny_config):
    host = student_host("mistral")
    base, slope = width_line(tiny_config, host, {})
    for width in (1, 77, 4096):
        assert base + slope * width == count_parameters(empty_model(dense_config(tiny_config, host, width)))


def test_whole_experts_only_within_five_percent(tiny_config):
    shape = teacher_geometry(tiny_config, teacher_cards()["mixtral"])
    base, slope = 1_000_000, 1000
    assert width_for(base + slope * 512, base, slope, shape) == 512
    assert width_for(base + slope * 300, base, slope, shape) == 256
    assert width_for(base + slope * 420, base, slope, shape) == 384  # a multiple of 64, not above
    assert width_for(base + slope * 50, base, slope, shape) == 0


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("7b", "not smaller than the teacher"),
        ("100%", "more than 0% and less than 100%"),
        ("1x%", "fraction such as 25%"),
        ("huge", "no known target"),
        ("10x", r"must be a size such as 7b .*, a share .*, a named target"),
        ("mistral-7b", "has num_hidden_layers = 32, but the teacher has 4"),
        ("./nowhere/model", "no dense checkpoint can be read"),
    ],
)
def test_refused(tiny_config, to, message):
    with pytest.raises(UserError, match=message):
        resolve_target(to, tiny_config, teacher_cards()["mixtral"])


def test_a_dense_checkpoint(tiny_config, tmp_path):
    config = dense_config(tiny_config, student_host("mistral"), 320)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    target = resolve_target(str(tmp_path / "dense"), tiny_config, teacher_cards()["mixtral"])
    assert (target.width, target.checkpoint) == (320, str(tmp_path / "dense"))
    config.vocab_size = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary of 100"):
        resolve_target(str(tmp_path / "other"), tiny_config, teacher_cards()["mixtral"])


def test_every_tensor_has_a_source_or_is_an_error(tiny_config):
    host = student_host("mistral")
    student = empty_model(dense_config(tiny_config, host, 128))
    names = {n for n, _ in empty_model(tiny_config).named_parameters()}
    sources = tensor_map(host, student, names)
    built = {n for n, _ in student.named_parameters() if ".mlp." in n}
    assert set(sources) | built == {n for n, _ in student.named_parameters()}
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has no source"):
        tensor_map(host, student, names - {"model.norm.weight"})


def test_a_field_the_teacher_lacks(tiny_config):
    import dataclasses

    host = dataclasses.replace(student_host("mistral"), rename={"hidden_act": "no_such_field"})
    with pytest.raises(UserError, match="'no_such_field'"):
        dense_config(tiny_config, host, 128)
