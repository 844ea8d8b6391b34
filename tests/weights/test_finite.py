"""NaN and infinity in weights, answers or training are refused by name, wherever they come in."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.evaluation.api import evaluate
from moe2dense.modeling.load import load_model
from moe2dense.student.build.api import build_student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.stream import Stream
from moe2dense.weights.finite import all_finite, refuse_not_finite
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings
from tests.teacher.families import blocks, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_bad_number_is_enough(dtype, bad):
    value = torch.randn(7, 130, dtype=torch.float32).to(dtype)
    assert all_finite(value)
    value[5, 41] = float(bad)
    assert not all_finite(value)
    with pytest.raises(UserError, match=r"it holds NaN or infinity \(1 of its 910 numbers\).*; do that"):
        refuse_not_finite(value, "it", "do that")


def test_large_numbers_whose_sum_overflows_are_finite():
    assert all_finite(torch.full((9,), torch.finfo(torch.float32).max))
    assert all_finite(torch.tensor([], dtype=torch.float32)) and all_finite(torch.tensor([2**40]))


def spoil(folder, part, number=float("nan")):
    """Write a number into the last entry of the first tensor whose name holds `part`; return the tensor's name."""
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if part in n)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name


PARTS = [
    "embed_tokens",
    "lm_head",
    "model.norm",
    "layers.1.input_layernorm",
    "layers.2.self_attn.q_proj",
    ".gate.weight",
    "experts.3.w2",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_teachers_tensor_is_named(tmp_path, part):
    ids = blocks(make("mixtral", tmp_path))
    ids[0, 0] = 100  # the last row of the embedding
    name = spoil(tmp_path, part, float("-inf") if "q_proj" in part else float("nan"))
    with pytest.raises(UserError, match=rf"tensor '{name}' holds NaN or infinity \(1 of its"):
        load_teacher(tmp_path, memory="100MB").run(ids)


@pytest.mark.parametrize("kind", ["streamed", "grouped_mm"])
def test_experts_in_every_layout_are_looked_at(tmp_path, kind):
    """gpt_oss keeps all experts of a layer in one tensor, biases apart."""
    ids = blocks(make("gpt_oss", tmp_path))
    name = spoil(tmp_path, "experts.down_proj_bias")
    with pytest.raises(UserError, match=rf"tensor '{name}' holds NaN"):
        load_teacher(tmp_path, memory="100MB", experts=kind).run(ids)


def test_every_use_of_a_spoilt_teacher_is_refused(tmp_path):
    ids = blocks(make("mixtral", tmp_path / "t"))
    name, text = spoil(tmp_path / "t", "layers.2.block_sparse_moe.experts.4.w1"), Blocks(ids)
    uses = {
        "targets": lambda teacher: write_targets(teacher, text, tmp_path / "targets"),
        "build": lambda teacher: build_student(teacher, to="80%", data=text, init="select"),
        "evaluate": lambda teacher: evaluate(make_student(), teacher, text),
    }
    for use in uses.values():
        with pytest.raises(UserError, match=f"tensor '{name}' holds NaN"):
            use(load_teacher(tmp_path / "t", memory="100MB"))


def test_a_layer_that_overflows_is_named(tmp_path, monkeypatch):
    """Finite weights whose product is not: infinity reaches the hidden states, which is a fault at real tokens alone."""
    ids, mask = blocks(make("mixtral", tmp_path)), torch.ones(4, 23, dtype=torch.long)
    mask[2, 20:] = 0
    teacher, layer = load_teacher(tmp_path), Stream._layer

    def spoilt(index, token):
        def run(self, which, hidden, out):
            result = layer(self, which, hidden, out)
            if which.index == index:
                result.hidden_out[2, token] = float("inf")
            return result

        return run

    monkeypatch.setattr(Stream, "_layer", spoilt(2, 21))
    assert teacher.run(ids, mask).logits is not None  # padding
    monkeypatch.setattr(Stream, "_layer", spoilt(1, 7))
    with pytest.raises(
        UserError, match=r"layer 1 gives NaN or infinity for 1 of 92 tokens \(first at block 2, token 7\)"
    ):
        teacher.run(ids, mask)


def test_a_dense_checkpoint_is_refused_by_tensor(tmp_path):
    make_student().save_pretrained(tmp_path)
    assert load_model(tmp_path) is not None
    name = spoil(tmp_path, "layers.1.mlp.up_proj", float("inf"))
    with pytest.raises(UserError, match=f"--baseline .* cannot be used: tensor '{name}' holds NaN or infinity"):
        load_model(tmp_path, "--baseline")


def test_answers_that_are_not_numbers_are_not_judged():
    student = make_student()
    with torch.no_grad():
        student.lm_head.weight[60] = float("nan")
    with pytest.raises(UserError, match="student"):
        evaluate(student, make_teacher(), make_blocks(3))
    truth = hidden_targets(make_teacher(), make_blocks(3))
    truth.hidden[1, 4] = float("nan")
    with pytest.raises(UserError, match="teacher: its logits are NaN or infinite for 1 of 33 tokens"):
        evaluate(make_student(), data=make_blocks(3), targets=truth)


def test_a_teacher_in_memory_gives_no_targets_of_nan(tmp_path):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="what its last layer gives on this text holds NaN"):
        write_targets(teacher, make_blocks(), tmp_path / "targets")


def test_held_out_targets_of_nan_stop_a_run_before_its_first_step():
    truth = hidden_targets(make_teacher(), make_blocks(3))
    truth.hidden[1, 4] = float("nan")
    with pytest.raises(UserError, match="the held-out KL is nan before any training"):
        distill(
            make_student(), make_teacher(), make_blocks(), valid=make_blocks(3), valid_targets=truth, config=settings()
        )


@pytest.mark.parametrize("saved", [True, False])
def test_a_last_step_that_overflows_is_noticed(tmp_path, saved):
    """No loss comes after the last step to show it."""
    options = dict(optimizer="adamw", lr=1e38, weight_decay=1e5, epochs=1.0, batch=24 * 12, save_every=1000)
    with pytest.raises(
        UserError, match="training stopped after step 1 of 1: it left NaN or infinity in .*; lower --lr"
    ) as caught:
        distill(
            make_student(), make_teacher(), make_blocks(), config=settings(**options), out=tmp_path if saved else None
        )
    assert ("step-000000 is as it was before" in str(caught.value)) == saved
