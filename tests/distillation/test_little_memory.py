"""Training that holds little: the same steps, and a stopped run goes on as if it had not been."""

import pytest
import torch

from moe2dense.distillation.api import distill
from moe2dense.errors import UserError
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


def test_steps_in_the_backward_pass_are_those_after_it(teacher):
    results = []
    for inside in (False, True):
        student = make_student()
        config = settings(clip=0.0, step_in_backward=inside, weight_decay=0.1)
        history = distill(student, teacher, make_blocks(), config=config).history
        results.append((weights(student), [r["grad_norm"] for r in history]))
    (one, norms), (other, norms_inside) = results
    assert all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-6) for k in one)
    assert norms == pytest.approx(norms_inside, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(optimizer="adamw-8bit", weights="bfloat16"),
        dict(optimizer="adafactor", weights="bfloat16", step_in_backward=True),
        dict(offload=True, weights="bfloat16", step_in_backward=True),
    ],
    ids=lambda options: "+".join(map(str, options.values())),
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(options, teacher, tmp_path, monkeypatch):
    whole, halves = make_student(hidden_size=64), make_student(hidden_size=64)
    blocks, config = make_blocks(16), settings(save_every=2, **options)
    result = distill(whole, teacher, blocks, config=config, out=tmp_path / "whole", seed=5)
    assert len(result.history) == 4
    from moe2dense.distillation import trainer

    step = trainer.train_step

    def stopped(*args):
        if args[4].lr == stop:
            raise KeyboardInterrupt
        return step(*args)

    stop = result.history[2]["lr"]
    monkeypatch.setattr(trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(halves, teacher, blocks, config=config, out=tmp_path / "halves", seed=5)
    monkeypatch.setattr(trainer, "train_step", step)
    again = make_student(hidden_size=64)
    distill(again, teacher, blocks, config=config, out=tmp_path / "halves", seed=5, resume=True)
    assert same(weights(whole), weights(again)) and next(again.parameters()).dtype == torch.float32


def test_a_step_in_several_passes_cannot_be_taken_in_the_backward_pass(teacher):
    with pytest.raises(UserError, match="step_in_backward needs one process and a whole step"):
        distill(make_student(), teacher, make_blocks(), config=settings(micro_batch=2, step_in_backward=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(optimizer="adam"), "train.optimizer must be one of .* found 'adam'"),
        (dict(weights="float16"), "train.weights must be one of float32, bfloat16"),
        (dict(cooldown=1.5), "train.cooldown must lie between"),
        (dict(shard=True, weights="bfloat16"), "train.shard spreads AdamW's states"),
        (dict(optimizer="muon", offload=True), "steps float32 weights"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, match, teacher):
    with pytest.raises(UserError, match=match):
        distill(make_student(), teacher, make_blocks(), config=settings(**options))


def test_compiled_layers_train_alike(teacher, monkeypatch):
    """With a backend that needs no compiler: the graphs are captured, and run as they are."""
    from moe2dense.distillation import trainer

    inner = trainer.compile_layers
    monkeypatch.setattr(trainer, "compile_layers", lambda model: inner(model, backend="eager"))
    results = []
    for compiled in (False, True):
        student = make_student()
        distill(student, teacher, make_blocks(8), config=settings(compile=compiled))
        results.append(weights(student))
        assert all(layer._compiled_call_impl is None for layer in student.model.layers)
    assert all(torch.allclose(results[0][k], results[1][k], rtol=1e-5, atol=1e-7) for k in results[0])
