"""transformers' internals, as the adapter uses them. When one of these fails, transformers moved: internals.py is where to follow."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.moe import grouped_mm_experts_forward

from moe2dense.modeling import internals
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, make

PACKAGE = Path(internals.__file__).parents[1]
INTERNAL = ("transformers.conversion_mapping", "transformers.core_model_loading", "transformers.integrations",
            "transformers.modeling_utils", "transformers.masking_utils")  # fmt: skip


def test_version_is_one_the_adapter_was_written_for():
    assert Version("5.20") <= Version(transformers.__version__) < Version("5.30")


def test_only_the_adapter_uses_internals():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not any(n.startswith(INTERNAL) for n in names), f"{path} imports {names}"


def test_signatures():
    assert list(inspect.signature(rename_source_key).parameters)[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ]  # fmt: skip
    assert list(inspect.signature(grouped_mm_experts_forward).parameters) == [
        "self", "hidden_states", "top_k_index", "top_k_weights",
    ]  # fmt: skip
    assert next(iter(inspect.signature(get_model_conversion_mapping).parameters)) == "model"


def test_conversion_rules_have_the_form_that_is_read():
    """Experts stored one by one are told by a '*' in a converter's source patterns, gate before up."""
    rules = get_checkpoint_conversion_mapping("qwen2_moe")
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    assert [c.source_patterns for c in converters] == [
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        ["mlp.experts.*.down_proj.weight"],
    ]
    mixtral = get_checkpoint_conversion_mapping("mixtral")
    assert any(isinstance(r, WeightRenaming) for r in mixtral)
    patterns = [c.source_patterns for c in mixtral if isinstance(c, WeightConverter)]
    assert patterns == [[".experts.*.w1.weight", ".experts.*.w3.weight"], [".experts.*.w2.weight"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_skeleton_holds_nothing_but_rotary_buffers(name, tmp_path):
    reference = make(name, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = internals.build_skeleton(config, torch.float32)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters()) and not model.training
    real = dict(reference.named_buffers())
    unsaved = {n for m in [model] for n, b in m.named_buffers() if not b.is_meta}
    assert unsaved == set(real) - set(reference.state_dict())
    for n in unsaved:
        assert torch.equal(model.get_buffer(n), real[n]), n
    assert model.config is not config


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_is_mapped_and_every_parameter_covered(name, tmp_path):
    """Put together from single tensors, every parameter equals what from_pretrained's own conversion loads."""
    reference = make(name, tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.ignored == []
    for key, value in reference.state_dict().items():
        assert torch.equal(teacher.tensor(key), value), key


def test_forwards_are_put_back_even_after_an_error():
    module = torch.nn.Linear(2, 2)
    x = torch.randn(1, 2)
    before = module(x)
    with pytest.raises(RuntimeError), internals.forwards({module: lambda x: x + 1}):
        assert torch.equal(module(x), x + 1)
        raise RuntimeError
    assert torch.equal(module(x), before) and "forward" not in module.__dict__
