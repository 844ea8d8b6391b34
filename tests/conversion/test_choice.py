"""A run exports the student that is closest to its teacher, whichever step it is from, and says so by its exit code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from moe2dense import __main__
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.choice import choose, load_checkpoint
from moe2dense.conversion.results import Result
from moe2dense.conversion.stages import control_init
from moe2dense.distillation.adapters import add_adapters, merge_adapters
from moe2dense.families.cards import student_host
from moe2dense.student.store import load_student, save_student
from moe2dense.student.types import Student


def trained(exported="last", **kl):
    return {"exported": exported, "best_step": 50, "steps": 200, "kl": kl}


@pytest.mark.parametrize(
    "built,record,exported,step,gained",
    [
        (0.9, trained(last=0.1), "last", 200, True),
        (0.9, trained("best", last=0.2, best=0.1), "best", 50, True),
        (0.0046, trained(last=0.948), "built", 0, False),
        (0.1, trained("best", last=0.948, best=0.1), "built", 0, False),  # no gain at all
        (0.1, trained(last=float("nan")), "built", 0, False),
    ],
)
def test_the_closest_is_exported(built, record, exported, step, gained):
    choice = choose(built, record)
    assert (choice.exported, choice.step, choice.gained) == (exported, step, gained)
    assert choice.to_dict()["kl"]["built"] == built and choice.to_dict()["steps"] == 200


@pytest.mark.parametrize("gained,code", [(True, 0), (None, 0), (False, 3)])
def test_a_conversion_that_gained_nothing_exits_with_3(gained, code, monkeypatch):
    result = Result(Path("out"), Path("out/model"), Path("out/report.html"), {}, "built", gained)
    assert result.exit_code == code
    monkeypatch.setattr(__main__, "app", lambda *_, **__: result)
    assert __main__.main(["convert", "teacher", "--to", "1m"]) == code


@pytest.mark.parametrize(
    "init,control", [("layerwise", "random+heal"), ("obs+refit", "random"), ("select+refit+heal", "random+heal")]
)
def test_the_control_is_healed_where_the_student_is(init, control):
    assert control_init(init) == control


def a_student(folder):
    torch.manual_seed(0)
    sizes = dict(vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MistralForCausalLM(MistralConfig(**sizes, intermediate_size=31, rope_theta=2e5, tie_word_embeddings=True))
    student = Student(model, student_host("mistral"), [None, None], "teacher", "concat", 0)
    save_student(student, folder)
    return load_student(folder)


def checkpoint(folder, step, weights):
    place = folder / f"step-{step:06d}"
    place.mkdir(parents=True)
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, place / "weights.safetensors")
    save_file({"x": torch.zeros(1)}, place / "optimizer.safetensors")
    (place / "state.json").write_text(json.dumps({"step": step}))


@pytest.mark.parametrize("lora", [0, 2])
def test_the_best_checkpoints_weights_come_back(lora, tmp_path):
    """Of a plain training and of one of adapters, which were merged into the student at the end."""
    config = replace(TrainConfig(), lora=lora)
    student = a_student(tmp_path / "built")
    model = add_adapters(student.model, config) if lora else student.model
    generator = torch.Generator().manual_seed(1)

    def move():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    ids = torch.randint(0, 41, (2, 9), generator=generator)
    move()
    checkpoint(tmp_path / "checkpoints", 7, {n: p for n, p in model.named_parameters() if p.requires_grad})
    with torch.no_grad():
        wanted = model.eval()(ids).logits
    move()
    last = replace(student, model=merge_adapters(model)) if lora else student
    with torch.no_grad():
        assert not torch.allclose(last.model.eval()(ids).logits, wanted, atol=0.1)
        best = load_checkpoint(last, tmp_path / "checkpoints", 7, tmp_path / "built", config)
        torch.testing.assert_close(best.model.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
