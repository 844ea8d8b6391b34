"""distill() against a hand-written loop, and what its settings do."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from moe2dense.config.schedules import learning_rate
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.targets.memory import HiddenTargets, ResidentTargets, hidden_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from tests.distillation.tiny_run import Stop, make_blocks, make_student, make_teacher, same, settings, weights


def test_equals_a_hand_written_loop():
    """Full logits, torch's autograd, plain AdamW and clipping, in float64."""
    teacher, student, blocks = make_teacher(torch.float64), make_student(torch.float64), make_blocks()
    config = settings(alpha=0.3, temperature=2.0, weight_decay=0.1, micro_batch=3)
    result = distill(student, teacher, blocks, config=config, seed=5)
    assert result.steps == 6 and result.tokens == result.unique == 24 * 12

    other = make_student(torch.float64)
    decayed = [p for p in other.parameters() if p.dim() > 1]
    plain = [p for p in other.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(6):
        ids = blocks.input_ids[step_blocks(24, 4, step, 5)]
        with torch.no_grad():
            p = (teacher(ids).logits / 2).softmax(-1)
        logits = other(ids).logits
        kd = 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (0.7 * kd + 0.3 * ce).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 3e-3, 0.03)
        optimizer.step()
        optimizer.zero_grad()
        record = result.history[step]
        assert record["parts"] == pytest.approx({"kd": kd.item(), "ce": ce.item()}, rel=1e-9)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-7)
    for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_micro_batches_do_not_change_the_step():
    teacher, results = make_teacher(torch.float64), []
    mask = torch.ones(24, 12, dtype=torch.bool)
    mask[::3, 7:] = False
    mask[5] = False
    for micro in (1, 3, 4):
        student = make_student(torch.float64)
        distill(student, teacher, make_blocks(attention_mask=mask), config=settings(micro_batch=micro, alpha=0.2))
        results.append(weights(student))
    for other in results[1:]:
        for k in other:
            torch.testing.assert_close(other[k], results[0][k], rtol=1e-8, atol=1e-10)


def test_validation_and_history(straight, teacher):
    folder, _, result = straight
    student, valid = make_student(), make_blocks(5, seed=9)
    with torch.no_grad():
        p, log_q = teacher(valid.input_ids).logits.softmax(-1), student(valid.input_ids).logits.log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1)
    nll = F.nll_loss(log_q[:, :-1].flatten(0, 1), valid.input_ids[:, 1:].flatten())
    first, *rest = result.history
    assert first["step"] == 0 and first["valid_kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert first["valid_nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert [r["step"] for r in rest] == list(range(1, 13)) and [r["tokens"] for r in rest] == list(range(48, 577, 48))
    assert [r["step"] for r in result.history if "valid_kl" in r] == [0, 4, 8, 12]
    assert rest[-1]["valid_kl"] < 0.95 * first["valid_kl"]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == result.history
    assert result.steps == 12 and result.tokens == 576 and result.unique == 288
    assert {"lr", "grad_norm", "tokens_per_second", "memory", "seconds"} <= rest[0].keys()
    keys = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert keys == sorted({f"step-{result.best_step:06d}", "step-000012"})


def test_rare_tokens_are_measured_apart(teacher):
    ids = torch.zeros(6, 12, dtype=torch.int64)
    ids[:, [3, 8]] = 7  # the only other token: rare
    train, student = Blocks(ids), make_student()
    record = distill(student, teacher, train, valid=train[:2], config=settings(lr=1e-30, batch=72)).history[0]
    with torch.no_grad():
        p, q = (m(ids[:2]).logits.log_softmax(-1) for m in (teacher, student))
    assert record["valid_rare_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1)[:, [2, 7]].mean().item(), rel=1e-4)


def test_worse_than_before_is_loud(teacher):
    student = make_teacher()
    with torch.no_grad():
        student.lm_head.weight.mul_(1.001)
    with pytest.warns(UserWarning, match="MADE THE STUDENT WORSE"):
        distill(student, teacher, make_blocks(), valid=make_blocks(3, seed=4), config=settings(lr=0.5))


def test_targets_of_every_kind_train_alike(teacher):
    blocks, results = make_blocks(), []
    once = hidden_targets(teacher, blocks, batch=5)
    for targets in (once, ResidentTargets(teacher, blocks), HiddenTargets(once.hidden, once.head)):
        student = make_student()
        distill(student, data=blocks, targets=targets, config=settings())
        results.append(weights(student))
    for other in results[1:]:
        for k in other:
            torch.testing.assert_close(other[k], results[0][k], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="24 blocks but the data has 7"):
        distill(make_student(), data=blocks[:7], targets=once)


def test_text_alone_trains_on_hard_labels():
    student, blocks = make_student(), make_blocks(4)
    results = distill(student, data=blocks, config=settings(alpha=1.0, epochs=40.0, lr=1e-2))
    assert results.history[-1]["parts"].keys() == {"ce"}
    assert results.history[-1]["loss"] < 0.5 < math.log(61) - 0.5 < results.history[0]["loss"]
    with pytest.raises(UserError, match="needs a teacher"):
        distill(student, data=blocks)


def test_documents_in_a_block_do_not_see_each_other():
    teacher, student = make_teacher(torch.float64), make_student(torch.float64)
    ids = make_blocks(4).input_ids
    packed = Blocks(ids, document_ids=(torch.arange(12) >= 5).int().expand(4, 12))
    kl = distill(student, teacher, packed, valid=packed, config=settings(lr=1e-30)).history[0]["valid_kl"]
    total = 0.0
    for part in (ids[:, :5], ids[:, 5:]):
        with torch.no_grad():
            p, q = (m(part).logits.log_softmax(-1) for m in (teacher, student))
        total += (p.exp() * (p - q)).sum().item()
    assert kl == pytest.approx(total / 48, rel=1e-9)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_trained_and_merged(teacher, tmp_path, dora):
    student, original = make_student(), make_student()
    config = settings(lora=4, dora=dora, lr=1e-2, epochs=3.0)
    inside: dict = {}

    def look(stage, done, total, **numbers):
        if stage == "distill" and done == total:
            ids = make_blocks().input_ids[:2]
            model = trainer_models[-1]
            with torch.no_grad():
                inside["logits"] = model.eval()(ids).logits
                inside["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)

    trainer_models = []
    import moe2dense.distillation.setup as module

    add = module.add_adapters
    module.add_adapters = lambda *a: trainer_models.append(add(*a)) or trainer_models[-1]
    try:
        result = distill(
            student, teacher, make_blocks(), valid=make_blocks(3, seed=4), config=config, out=tmp_path, progress=look
        )
    finally:
        module.add_adapters = add
    kls = [r["valid_kl"] for r in result.history if "valid_kl" in r]
    assert kls[-1] < kls[0] and inside["trained"] < 0.4 * sum(p.numel() for p in original.parameters())
    assert student.state_dict().keys() == original.state_dict().keys() and all(
        p.requires_grad for p in student.parameters()
    )
    with torch.no_grad():
        torch.testing.assert_close(student(make_blocks().input_ids[:2]).logits, inside["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(student.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    again = make_student()
    distill(again, teacher, make_blocks(), valid=make_blocks(3, seed=4), config=config, out=tmp_path, resume=True)
    assert same(weights(again), weights(student))


def test_gradient_checkpointing_gives_the_same_weights(teacher):
    results = []
    for on in (False, True):
        student = make_student()
        distill(student, teacher, make_blocks(), config=settings(gradient_checkpointing=on))
        results.append(weights(student))
    assert all(torch.allclose(results[0][k], results[1][k], rtol=1e-5, atol=1e-7) for k in results[0])


def test_tied_embeddings_and_alpha_schedule(teacher):
    student = make_student(tie_word_embeddings=True)
    results = distill(student, teacher, make_blocks(), config=settings(alpha_schedule="step:1:0"))
    assert [sorted(r["parts"]) for r in results.history] == [["ce"]] * 3 + [["kd"]] * 3
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_unknown_logit_rules_are_noticed(teacher):
    student = make_student()
    plain = student.forward

    def odd(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    student.forward = odd
    with pytest.raises(UserError, match="changes its logits"):
        distill(student, teacher, make_blocks())


def test_learning_rate_follows_the_shape_unless_given(teacher):
    peak = max(
        r["lr"] for r in distill(make_student(), teacher, make_blocks(), config=settings(lr=0.0, warmup=0.0)).history
    )
    assert peak == pytest.approx(1e-3, rel=0.1)  # hidden size 24 in two layers, first of 6 steps of the cosine


def test_bad_arguments(teacher):
    student, blocks = make_student(), make_blocks()
    with pytest.raises(UserError, match="at least one block"):
        distill(student, teacher, blocks[:0])
    with pytest.raises(UserError, match="less than one block"):
        distill(student, teacher, blocks, tokens=5)
    with pytest.raises(UserError, match="no token carries loss"):
        distill(student, teacher, make_blocks(attention_mask=torch.zeros(24, 12, dtype=torch.bool)))
    with pytest.raises(UserError, match="--report-to tensorboar"):
        distill(student, teacher, blocks, config=settings(report_to="tensorboar"))
    with pytest.raises(UserError, match="shard=True needs out="):
        distill(student, teacher, blocks, config=settings(shard=True))
    assert distill(student, teacher, blocks, tokens=100, config=settings()).unique == 96


class TestFeatures:
    """Losses on hidden states, beside the logits."""

    def test_equals_a_hand_written_loop(self):
        teacher, student, blocks = make_teacher(torch.float64), make_student(torch.float64), make_blocks()
        config = settings(features="mse:0=0,1=1", feature_weight="linear:0.5:0.1", micro_batch=3)
        result = distill(student, teacher, blocks, config=config)
        other = make_student(torch.float64)
        optimizer = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(6):
            ids = blocks.input_ids[step_blocks(24, 4, step, 0)]
            with torch.no_grad():
                goal_first = teacher(ids, output_hidden_states=True).hidden_states[1]
                goal_last = self.before_norm(teacher, ids)
            first, last = other(ids, output_hidden_states=True).hidden_states[1], self.before_norm(other, ids)
            pairs = ((first, goal_first), (last, goal_last))
            errors = [(s - t).square().sum(-1) / t.square().sum(-1) for s, t in pairs]
            mse = sum((2 * (1 + e).sqrt() - 2).mean() for e in errors) / 2
            with torch.no_grad():
                p = teacher(ids).logits.softmax(-1)
            kd = (p * (p.log() - other(ids).logits.log_softmax(-1))).sum(-1).mean()
            (kd + (0.5 - 0.08 * step) * mse).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 6, 3e-3, 0.03)
            optimizer.step()
            optimizer.zero_grad()
            assert result.history[step]["parts"] == pytest.approx({"kd": kd.item(), "features": mse.item()}, rel=1e-8)
        for a, b in zip(student.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # Adam magnifies rounding where gradients vanish

    @staticmethod
    def before_norm(model, ids):
        """The last layer's output, which transformers shows only after the final norm."""
        results = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: results.append(inputs[0]))
        model(ids)
        handle.remove()
        return results[0]

    @pytest.mark.parametrize("features", ["cosine:uniform", "mse:learned"])
    def test_projectors_train_resume_and_stay_out_of_the_student(self, teacher, tmp_path, features):
        small = dict(hidden_size=16, head_dim=4, num_hidden_layers=3)
        config = settings(features=features, epochs=2.0)

        def stop(stage, done, total, **numbers):
            if done == 7 and stage == "distill":
                raise Stop

        whole, resumed = make_student(**small), make_student(**small)
        result = distill(whole, teacher, make_blocks(), config=config, out=tmp_path / "whole")
        parts = [r["parts"]["features"] for r in result.history]
        assert parts[-1] < parts[0]
        with pytest.raises(Stop):
            distill(make_student(**small), teacher, make_blocks(), config=config, out=tmp_path / "part", progress=stop)
        distill(resumed, teacher, make_blocks(), config=config, out=tmp_path / "part", resume=True)
        assert same(weights(whole), weights(resumed)) and not any("match" in k for k in whole.state_dict())

    def test_features_come_from_memory_a_resident_model_or_a_store(self, teacher, tmp_path):

        blocks, results = make_blocks(), []
        write_targets(teacher, blocks, tmp_path, features=[0, 1])
        sources = (
            hidden_targets(teacher, blocks, features=[0, 1]),
            ResidentTargets(teacher, blocks, features=[0, 1]),
            open_targets(tmp_path, blocks),
        )
        for targets in sources:
            history = distill(make_student(), data=blocks, targets=targets, config=settings(features="mse")).history
            results.append([r["parts"]["features"] for r in history])
        assert results[1] == pytest.approx(results[0], rel=1e-4) and results[2] == pytest.approx(results[0], rel=2e-2)
        with pytest.raises(UserError, match="hidden-1 is missing"):
            held_out = hidden_targets(teacher, blocks, features=[0])
            distill(make_student(), data=blocks, targets=held_out, config=settings(features="mse:uniform"))
        with pytest.raises(UserError, match="need targets that hold them"):
            distill(
                make_student(), data=blocks, targets=hidden_targets(teacher, blocks), config=settings(features="mse")
            )
        with pytest.raises(UserError, match="must be KIND:MAP"):
            distill(make_student(), teacher, blocks, config=settings(features="l2"))


@pytest.mark.parametrize(
    "reached, best",
    [
        ({1.0: 1.0, 2.0: 0.98, 4.0: 0.985}, 2.0),
        ({1.0: 1.0, 2.0: 0.995, 4.0: 1.2}, 1.0),  # not better by 1%
        ({4.0: 0.7, 2.0: 0.9}, 4.0),  # 1 was not tried
    ],
)
def test_another_temperature_must_be_better_by_a_hundredth(teacher, monkeypatch, reached, best):
    from moe2dense.distillation import temperature
    from moe2dense.distillation.batches import Batches
    from moe2dense.distillation.trainer import TrainResult

    class Measured:
        def __init__(self, model, batches, held_out, config, *_, **__):
            self.kl = reached[config.temperature]

        def run(self, *_, quiet):
            return TrainResult(1, 1, 1, [{"valid_kl": 9.0}, {"valid_kl": self.kl}])

    monkeypatch.setattr(temperature, "Trainer", Measured)
    batches = Batches(make_blocks(), hidden_targets(teacher, make_blocks()))
    got = temperature.choose_temperature(make_student(), batches, batches, settings(), candidates=tuple(reached))
    assert got == (best, reached)


def test_temperature_is_chosen_by_held_out_kl(teacher):
    from moe2dense.distillation.batches import Batches
    from moe2dense.distillation.temperature import choose_temperature

    blocks, valid = make_blocks(), make_blocks(5, seed=9)
    batches = Batches(blocks, hidden_targets(teacher, blocks))
    held_out = Batches(valid, hidden_targets(teacher, valid))
    student, before = make_student(), weights(make_student())
    config = settings(epochs=10.0, lr=1e-2)
    best, table = choose_temperature(student, batches, held_out, config, candidates=(1.0, 50.0))
    assert table[50.0] > 1.02 * table[1.0] and best == 1.0
    assert same(weights(student), before)
    short = make_student()
    alone = distill(
        short,
        data=blocks,
        targets=batches.targets,
        valid=valid,
        valid_targets=held_out.targets,
        config=settings(lr=1e-2),
    )
    assert table[1.0] == pytest.approx(alone.history[-1]["valid_kl"], rel=1e-4)  # a tenth of 60 steps
    still, _ = choose_temperature(make_student(), batches, held_out, settings(lr=1e-30), candidates=(2.0, 1.0))
    assert still == 1.0  # nothing is learnt, so it does not matter
    auto = distill(make_student(), teacher, blocks, valid=valid, config=settings(temperature_schedule="auto"))
    assert auto.steps == 6
    with pytest.raises(UserError, match="temperature auto needs validation"):
        distill(make_student(), teacher, blocks, config=settings(temperature_schedule="auto"))
