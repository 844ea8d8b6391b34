"""Regimes with a second model against hand-written loops, in float64, and that they resume bit by bit."""

import copy
import random

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.config.schedules import learning_rate
from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.multiview import scaled_embeddings
from moe2dense.distillation.targets.memory import HiddenTargets, hidden_targets
from moe2dense.distillation.targets.mixture import MixedRows
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import LogitRows
from tests.distillation.regimes.kills import run_killed
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights

DOUBLE = torch.float64


def make_peer(dtype=torch.float32):
    torch.manual_seed(6)
    sizes = dict(
        vocab_size=61, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return MistralForCausalLM(MistralConfig(**sizes, intermediate_size=24)).to(dtype)


def adam(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)


def update(model, optimizer, loss, step, steps=6, peak=3e-3):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, peak, 0.03)
    optimizer.step()
    optimizer.zero_grad()


def ce(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def kl(p, logits):
    return (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()


def close(model, other, rtol=1e-6, atol=1e-8):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)


class Stop(Exception):
    pass


class TestMixture:
    def rows(self, shares, n=7, v=13):
        torch.manual_seed(0)
        return [(w, LogitRows(torch.randn(n, v, dtype=DOUBLE) * 2)) for w in shares]

    @pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd:0.3"])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_value_and_gradient_are_those_of_the_mixed_distribution(self, loss, temperature):
        parts = self.rows([0.2, 0.5, 0.3])
        p = sum(w * (r.logits / temperature).softmax(-1) for w, r in parts)
        student = torch.randn(7, 13, dtype=DOUBLE, requires_grad=True)
        mask = torch.tensor([True, False, True, True, True, False, True])
        ours = distillation_loss(student, None, MixedRows(parts), loss=loss, temperature=temperature, mask=mask)
        plain = distillation_loss(
            student, None, LogitRows(p.log() * temperature), loss=loss, temperature=temperature, mask=mask
        )
        assert ours.total.item() == pytest.approx(plain.total.item(), rel=1e-9)
        grads = [torch.autograd.grad(x.total, student)[0] for x in (ours, plain)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)

    def test_forward_kl_has_the_gradient_of_the_weighted_losses(self):
        parts = self.rows([0.35, 0.65])
        student = torch.randn(7, 13, dtype=DOUBLE, requires_grad=True)
        mixed = torch.autograd.grad(distillation_loss(student, None, MixedRows(parts)).total, student)[0]
        apart = sum(w * kl(r.logits.softmax(-1), student) for w, r in parts)
        torch.testing.assert_close(mixed, torch.autograd.grad(apart, student)[0], rtol=1e-9, atol=1e-12)

    def test_only_ids_that_all_parts_know_count(self):
        rows = MixedRows([(0.5, LogitRows(torch.randn(3, 9))), (0.5, LogitRows(torch.randn(3, 11)))])
        assert rows.vocabulary == 9 and len(rows.select(torch.tensor([2]))) == 1
        loss = distillation_loss(torch.randn(3, 11, requires_grad=True), None, rows)
        assert torch.autograd.grad(loss.total, loss.total)[0] == 1 and loss.total.isfinite()

    def test_compressed_targets_are_refused(self, tmp_path):
        from moe2dense.distillation.targets.store import open_targets
        from moe2dense.distillation.targets.write import write_targets

        blocks = make_blocks()
        write_targets(make_teacher(), blocks, tmp_path, format="sampled")
        with pytest.raises(UserError, match="needs its whole distributions, found SampledRows"):
            distill(
                make_student(),
                data=blocks,
                targets=open_targets(tmp_path, blocks),
                config=settings(),
                regime=make_regime("ema"),
            )


@pytest.mark.parametrize("share", ["1", "0.4"])
def test_mutual_learning_equals_two_networks_in_turn(share):
    """1706.00384, algorithm 1: each follows the other's present prediction and the labels; with the teacher as a third."""
    teacher, student, peer, blocks = make_teacher(DOUBLE), make_student(DOUBLE), make_peer(DOUBLE), make_blocks()
    regime = make_regime("mutual", RegimeConfig(share=share, peer_lr=1e-3), peer=peer)
    config = settings(alpha=0.5, temperature=2.0, optimizer="adamw")
    result = distill(student, None if share == "1" else teacher, blocks, config=config, seed=5, regime=regime)
    first, second, w = make_student(DOUBLE), make_peer(DOUBLE), float(share)
    optimizers = adam(first), adam(second)
    for step in range(6):
        ids = blocks.input_ids[step_blocks(24, 4, step, 5)]
        with torch.no_grad():
            taught = (teacher(ids).logits / 2).softmax(-1)
        losses = []
        for model, other, optimizer, peak in (
            (first, second, optimizers[0], 3e-3),
            (second, first, optimizers[1], 1e-3),
        ):
            with torch.no_grad():
                goal = (other(ids).logits / 2).softmax(-1)
            logits = model(ids).logits
            kd = w * kl(goal, logits / 2) + (1 - w) * kl(taught, logits / 2)
            update(model, optimizer, 0.5 * 4 * kd + 0.5 * ce(logits, ids), step, peak=peak)
            mixed = kl(w * goal + (1 - w) * taught, logits.detach() / 2)
            losses.append((0.5 * 4 * mixed + 0.5 * ce(logits.detach(), ids)).item())
        record = result.history[step]
        assert [record["loss"], record["peer_loss"]] == pytest.approx(losses, rel=1e-8)
    close(student, first)
    close(peer, second)


def test_online_teacher_learns_the_text_and_the_student_follows():
    teacher, student, blocks = make_teacher(DOUBLE), make_student(DOUBLE), make_blocks()
    ours = copy.deepcopy(teacher)
    result = distill(student, None, blocks, config=settings(), seed=5, regime=make_regime("online", teacher=ours))
    other = make_student(DOUBLE)
    pair = adam(other), adam(teacher)
    for step in range(6):
        ids = blocks.input_ids[step_blocks(24, 4, step, 5)]
        with torch.no_grad():
            goal = teacher(ids).logits.softmax(-1)
        update(other, pair[0], kl(goal, other(ids).logits), step)
        loss = ce(teacher(ids).logits, ids)
        assert result.history[step]["teacher_ce"] == pytest.approx(loss.item(), rel=1e-9)
        update(teacher, pair[1], loss, step)
    close(student, other)
    close(ours, teacher)


def test_averaged_weights_have_their_closed_form_and_teach():
    """After k steps the average is d^k w0 + (1 - d) sum_i d^(k-i) w_i."""
    student, blocks, path, mixtures = make_student(DOUBLE), make_blocks(), [], []
    path.append(weights(student))
    regime = make_regime("ema", RegimeConfig(share="0.3", decay=0.8))
    after, batches = regime.after_step, regime.batches_for

    def look(step, given, plan):
        after(step, given, plan)
        path.append(weights(student))
        return {}

    def look_at_batches(step, given, plan):
        mixed = batches(step, given, plan)
        mixtures.append((plan.indices, mixed[0].targets.batch(plan.indices)))
        return mixed

    regime.after_step, regime.batches_for = look, look_at_batches
    teacher = make_teacher(DOUBLE)
    distill(student, teacher, blocks, config=settings(), regime=regime)
    for step in range(6):
        average = {k: 0.8**step * v for k, v in path[0].items()}
        for i in range(1, step + 1):
            average = {k: v + 0.2 * 0.8 ** (step - i) * path[i][k] for k, v in average.items()}
        model = make_student(DOUBLE)
        model.load_state_dict(average)
        indices, rows = mixtures[step]
        (w, given), (own, ours) = rows.parts
        assert (w, own) == pytest.approx((0.7, 0.3))
        with torch.no_grad():
            states = model.model(blocks.input_ids[indices]).last_hidden_state.flatten(0, 1)
            torch.testing.assert_close(ours.hidden, states, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                given.head.logits(given.hidden),
                teacher(blocks.input_ids[indices]).logits.flatten(0, 1),
                rtol=1e-9,
                atol=1e-9,
            )


class TestViews:
    def test_target_is_the_mean_of_the_views_and_the_student_sees_another(self):
        student, blocks = make_student(DOUBLE), make_blocks()
        regime = make_regime("multiview", RegimeConfig(share="1", views=3, dropout=0.25))
        result = distill(student, data=blocks, config=settings(micro_batch=3), seed=5, regime=regime)
        other = make_student(DOUBLE)
        optimizer = adam(other)
        for step in range(6):
            rows = step_blocks(24, 4, step, 5)
            regime.step = step
            embedded = other.model.embed_tokens(blocks.input_ids[rows])
            with torch.no_grad():
                views = [other(inputs_embeds=embedded * regime.mask(rows, v)).logits.softmax(-1) for v in (1, 2, 3)]
            loss = kl(sum(views) / 3, other(inputs_embeds=embedded * regime.mask(rows, 0)).logits)
            assert result.history[step]["loss"] == pytest.approx(loss.item(), rel=1e-8)
            update(other, optimizer, loss, step)
        close(student, other)
        assert student(blocks.input_ids[:1]).logits.equal(student(blocks.input_ids[:1]).logits)  # nothing stays hooked

    def test_a_view_ends_with_its_pass(self):
        student, ids = make_student(), make_blocks().input_ids[:2]
        plain = student(ids).logits
        with pytest.raises(Stop), scaled_embeddings(student, torch.zeros(2, 12, 24)):
            assert not student(ids).logits.equal(plain)
            raise Stop
        assert student(ids).logits.equal(plain)

    def test_masks_drop_their_share_and_differ(self):
        student = make_student()
        regime = make_regime("multiview", RegimeConfig(dropout=0.25, share="1"))
        distill(student, data=make_blocks(), config=settings(), regime=regime)
        masks = torch.stack([regime.mask(list(range(24)), v) for v in (0, 1, 2)])
        assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
        assert (masks == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        flat = masks.flatten(0, 1).flatten(1)
        assert len(flat.unique(dim=0)) == 72 and torch.equal(regime.mask([7], 1)[0], masks[1, 7])

    def test_without_dropout_there_is_nothing_to_learn(self):
        regime = make_regime("multiview", RegimeConfig(dropout=0.0, share="1"))
        history = distill(make_student(DOUBLE), data=make_blocks(), config=settings(), regime=regime).history
        assert history[0]["loss"] == pytest.approx(0, abs=1e-12)

    def test_validation_sees_no_mask(self):
        held_out = make_blocks(5, seed=9)
        regime = make_regime("multiview", RegimeConfig(dropout=0.4))
        student = make_student()
        result = distill(
            student, make_teacher(), make_blocks(), valid=held_out, config=settings(eval_every=2), regime=regime
        )
        with torch.no_grad():
            p = make_teacher()(held_out.input_ids).logits.softmax(-1)
            assert result.history[-1]["valid_kl"] == pytest.approx(
                kl(p, student(held_out.input_ids).logits).item(), rel=1e-4
            )


LOSSES = {"policy-gradient": "reverse_kl"}
RESUMED = ["policy-gradient", "online", "mutual", "ema", "multiview", "mtp"]


def regime_called(name):
    options = RegimeConfig(share="linear:0.2:0.8", decay=0.9, rollout_steps=3, teacher_mix=0.2)
    return make_regime(name, options, make_teacher(), make_peer())


def run(name, out, student, **more):
    return distill(
        student, make_teacher(), make_blocks(), valid=make_blocks(5, seed=9), seed=3, out=out, regime=regime_called(name),
        config=settings(epochs=1.0, save_every=2, alpha=0.3, loss=LOSSES.get(name, "forward_kl")), **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_runs_are_bit_exact(tmp_path, name):
    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == 3:
            raise Stop

    whole, resumed = make_student(), make_student()
    expected = run(name, tmp_path / "whole", whole)
    with pytest.raises(Stop):
        run(name, tmp_path / "part", make_student(), progress=stop)
    result = run(name, tmp_path / "part", resumed, resume=True)
    assert same(weights(whole), weights(resumed))
    keys = ("step", "loss", "valid_kl", "peer_loss", "teacher_ce", "reward", "head_1")
    assert [[r.get(k) for k in keys] for r in result.history] == [[r.get(k) for k in keys] for r in expected.history]


def to_the_end(name, out, final, progress):
    student = make_student()
    run(name, out, student, resume=True, progress=progress)
    torch.save(student.state_dict(), final)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_killed_runs_go_on_bit_exactly(tmp_path, name):
    whole, rng, killed = make_student(), random.Random(2), 0
    run(name, tmp_path / "whole", whole)
    for attempt in range(2):
        final = tmp_path / f"{attempt}.pt"
        killed += run_killed(to_the_end, (name, tmp_path / str(attempt)), final, rng)
        assert same(torch.load(final, weights_only=True), weights(whole))
    assert killed >= 3


def test_what_they_cannot_work_with():
    blocks = make_blocks()
    with pytest.raises(UserError, match="needs a second student"):
        make_regime("mutual")
    with pytest.raises(UserError, match="needs it in memory"):
        make_regime("online")
    with pytest.raises(UserError, match="share is 0.5, and the rest is the teacher's"):
        distill(make_student(), data=blocks, config=settings(alpha=1.0), regime=make_regime("ema"))
    with pytest.raises(UserError, match="distill needs a teacher or targets"):
        distill(make_student(), data=blocks, config=settings(), regime=make_regime("ema"))
    hidden = hidden_targets(make_teacher(), blocks)
    peer = make_regime("mutual", peer=make_peer())
    assert (
        distill(
            make_student(),
            data=blocks,
            targets=HiddenTargets(hidden.hidden, hidden.head),
            config=settings(),
            regime=peer,
        ).steps
        == 6
    )
