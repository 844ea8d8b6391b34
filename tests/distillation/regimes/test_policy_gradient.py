"""The policy gradient of whole texts' reverse KL: by enumeration of every text, by autograd, and as a run makes it; in float64."""

import itertools

import pytest
import torch

from moe2dense.common.seeds import uniforms
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import RegimeConfig, TrainConfig
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.regimes.checks import check_regime_settings
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.policy_rows import PolicyRows, gains
from moe2dense.errors import UserError
from moe2dense.generation.decoders import ResidentDecoder
from moe2dense.generation.in_memory import continued
from moe2dense.generation.mixed_sampling import MixedSampler
from moe2dense.generation.sampling import Sampling
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import LogitRows
from moe2dense.teacher.decode import Decoder
from moe2dense.teacher.load import load_teacher
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings

DOUBLE = torch.float64
WORDS, LENGTH = 3, 3


def policy(teacher, **options):
    return make_regime("policy-gradient", RegimeConfig(**({"share": "1", "prompt": 0.3} | options)), teacher)


def tables(seed):
    """Logits [V] after every beginning of a text of LENGTH words."""
    generator = torch.Generator().manual_seed(seed)
    begun = [b for n in range(LENGTH) for b in itertools.product(range(WORDS), repeat=n)]
    return {b: torch.randn(WORDS, generator=generator, dtype=DOUBLE).requires_grad_() for b in begun}


def test_its_expectation_over_all_texts_is_the_gradient_of_their_reverse_kl():
    """Also over all pairs of texts, each the other's baseline."""
    p, q = tables(0), tables(1)
    texts = list(itertools.product(range(WORDS), repeat=LENGTH))
    logits = {text: torch.stack([q[text[:t]] for t in range(LENGTH)]) for text in texts}
    taught = {text: torch.stack([p[text[:t]] for t in range(LENGTH)]).detach() for text in texts}

    def log_p(rows, text):
        return rows.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]

    whole = sum(log_p(logits[t], t).sum().exp() * (log_p(logits[t], t) - log_p(taught[t], t)).sum() for t in texts)
    expected = torch.autograd.grad(whole, list(q.values()))
    own = {t: log_p(logits[t], t).detach() for t in texts}
    given = {t: log_p(taught[t], t) for t in texts}

    def estimated(drawn, baseline):
        """The estimator's mean over some texts."""
        ones = torch.ones(len(drawn), LENGTH, dtype=DOUBLE)
        old, new = (torch.stack([x[t] for t in drawn]) for x in (own, given))
        gain = gains(new - old, ones.bool(), ones, normalize=False, baseline=baseline)
        known = (torch.tensor(drawn).flatten(), old.flatten(), ones.flatten(), gain.flatten())
        rows = PolicyRows(LogitRows(torch.cat([taught[t] for t in drawn])), *known)
        written = torch.cat([logits[t] for t in drawn])
        return distillation_loss(written, None, rows, loss="reverse_kl", denominator=float(len(drawn))).total

    alone = sum(own[t].sum().exp() * estimated([t], False) for t in texts)
    pairs = sum(
        (own[a].sum() + own[b].sum()).exp() * estimated([a, b], True) for a, b in itertools.product(texts, repeat=2)
    )
    for estimate in (alone, pairs):
        gradient = torch.autograd.grad(estimate, list(q.values()))
        for a, b in zip(gradient, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    single = sum(
        own[t].sum().exp()
        * distillation_loss(logits[t], None, LogitRows(taught[t]), loss="reverse_kl", denominator=1.0).total
        for t in texts
    )
    short = torch.autograd.grad(single, list(q.values()))
    assert max((a - b).abs().max() for a, b in zip(short, expected, strict=True)) > 1e-2  # what single words leave out


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_rows_equal_autograd_when_the_student_has_moved_on(clip):
    generator = torch.Generator().manual_seed(3)
    n, v = 57, 13
    logits = torch.randn(n, v, generator=generator, dtype=DOUBLE).requires_grad_()
    taught = torch.randn(n, v, generator=generator, dtype=DOUBLE)
    ids = torch.randint(0, v, (n,), generator=generator)
    weight, gain = torch.rand(n, generator=generator, dtype=DOUBLE), torch.randn(n, generator=generator, dtype=DOUBLE)
    mask = torch.rand(n, generator=generator) > 0.2
    log_q = logits.log_softmax(-1)
    word = log_q.gather(1, ids[:, None])[:, 0]
    old = word.detach() + 0.3 * torch.randn(n, generator=generator, dtype=DOUBLE)
    ratio = (word - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip) if clip else ratio
    kl = (log_q.exp() * (log_q - taught.log_softmax(-1))).sum(-1)
    per_word = weight * kl - torch.minimum(ratio * gain, clipped * gain)
    expected = per_word[mask].sum() / 7
    (slope,) = torch.autograd.grad(expected, logits, retain_graph=True)
    rows = PolicyRows(LogitRows(taught), ids, old, weight, gain, clip)
    loss = distillation_loss(logits, None, rows, mask=mask, loss="reverse_kl", denominator=7.0, tile_bytes=13 * 8 * 10)
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss.total, logits)[0], slope, rtol=1e-10, atol=1e-14)
    if clip:
        assert not torch.equal(ratio, clipped)


def test_a_word_earns_the_mean_of_what_follows_it_in_its_text():
    reward = torch.tensor([[9.0, 1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 3.0, 5.0, 7.0]])
    written = torch.tensor([[False, True, True, True, True], [False, False, True, True, False]])
    weight = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0]]).repeat(2, 1)
    assert gains(reward, written, weight, False, False).tolist() == [[0, 28, 12, 8, 0], [0, 0, 5, 0, 0]]
    assert gains(reward, written, weight, True, False)[0].tolist() == pytest.approx([0, 28 / 3, 6, 8, 0])
    assert gains(reward, written, weight, False, True).tolist() == [[0, 28, 7, 8, 0], [0, 0, -7, -8, 0]]


@pytest.mark.parametrize("streamed", [False, True])
def test_words_are_drawn_from_the_mixture_and_their_odds_kept(tmp_path, streamed):
    """Against whole forwards of both models over the text so far; three rows at a time."""
    dtype = torch.float32 if streamed else DOUBLE
    student, taught, ids = make_student(dtype), make_teacher(dtype), make_blocks(5, 11).input_ids
    if streamed:
        taught.save_pretrained(tmp_path)
        teacher = load_teacher(tmp_path, memory="64MB")

    def beside(text):
        return Decoder(teacher, text.tolist()) if streamed else ResidentDecoder(taught, text)

    def fresh(texts):
        return MixedSampler(texts, 11, Sampling(0.8, 0.9), 50, beside, 0.4)

    draws = fresh(5)
    numbers = [4, 0, 17, 1, 2]
    text = continued(student, ids, 4, Sampling(seed=6), numbers, sampler=draws, at_once=3)
    again = continued(student, ids[3:4], 4, Sampling(seed=6), numbers[3:4], sampler=fresh(1))
    assert torch.equal(again[0], text[3]) and int(text[:, 4:].max()) < 50
    with torch.no_grad():
        p, q = (m(text).logits[:, 3:-1, :50].double() for m in (taught.eval(), student.eval()))
    sharp = (q / 0.8).softmax(-1)
    order = sharp.sort(-1, descending=True)
    nucleus_p = torch.zeros_like(sharp).scatter_(
        -1, order.indices, order.values * (order.values.cumsum(-1) - order.values < 0.9)
    )
    b = 0.4 * p.softmax(-1) + 0.6 * nucleus_p / nucleus_p.sum(-1, keepdim=True)
    words = text[:, 4:, None]
    close = {"rtol": 1e-4, "atol": 1e-5} if streamed else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(draws.log_b[:, 4:], b.gather(-1, words)[..., 0].log(), **close)
    torch.testing.assert_close(draws.log_q[:, 4:], q.log_softmax(-1).gather(-1, words)[..., 0], **close)
    assert not draws.log_b[:, :4].any()
    for row, number in enumerate(numbers):
        for t, u in enumerate(uniforms(6, number, 7)):
            before, after = (float(b[row, t, : int(text[row, 4 + t]) + i].sum()) for i in (0, 1))
            assert before - 1e-4 <= u <= after + 1e-4


def test_the_loss_of_a_run_is_the_papers():
    """First step of a window and the one after it, whose weights have moved: the two terms written out from the models."""
    teacher, student, blocks = make_teacher(DOUBLE), make_student(DOUBLE), make_blocks(8)
    start = make_student(DOUBLE)
    regime = policy(teacher, teacher_mix=0.25, rollout_steps=2, ratio_clip=0.0, baseline=False)
    seen, plain, moved = [], regime.batches_for, []

    def look(step, batches, plan):
        moved.append({k: v.clone() for k, v in student.state_dict().items()})
        seen.append(plain(step, batches, plan)[0].blocks.input_ids)
        return plain(step, batches, plan)

    regime.batches_for = look
    history = distill(
        student, data=blocks, config=settings(loss="reverse_kl", alpha=1.0), seed=5, regime=regime
    ).history
    for step, (text, state) in enumerate(zip(seen, moved, strict=True)):
        assert torch.equal(text[:, :4], blocks.input_ids[step_blocks(8, 4, step, 5)][:, :4])
        now = make_student(DOUBLE)
        now.load_state_dict(state)
        words = text[:, 4:, None]
        with torch.no_grad():
            log_p, log_old, log_now = (m(text).logits[:, 3:-1].log_softmax(-1) for m in (teacher, start, now))
            r = (log_p - log_old).gather(-1, words)[..., 0]
            mixed = (0.25 * log_p.exp() + 0.75 * log_old.exp()).gather(-1, words)[..., 0]
            weight = log_old.gather(-1, words)[..., 0].exp() / mixed
            kl = (log_now.exp() * (log_now - log_p)).sum(-1)
            moves = (log_now - log_old).gather(-1, words)[..., 0].exp()
            total = 0.0
            for t in range(8):
                gain = r[:, t + 1 :].mean(1) if t < 7 else torch.zeros(4, dtype=DOUBLE)
                total += (weight[:, t] * (kl[:, t] - moves[:, t] * gain)).sum() / 32
        assert history[step]["loss"] == pytest.approx(total.item(), rel=1e-8)
        assert history[step]["reward"] == pytest.approx((weight * r).mean().item(), rel=1e-8)


def test_steps_between_learn_the_texts_own_words():
    blocks, student = make_blocks(8), make_student(DOUBLE)
    with torch.no_grad():
        logits = student(blocks.input_ids[step_blocks(8, 4, 0, 5)]).logits[:, :-1]
    history = distill(
        student, data=blocks, config=settings(loss="reverse_kl", alpha=1.0), seed=5,
        regime=policy(make_teacher(DOUBLE), share="step:0:1"),
    ).history  # fmt: skip
    words = blocks.input_ids[step_blocks(8, 4, 0, 5)][:, 1:]
    nll = -logits.log_softmax(-1).gather(-1, words[..., None]).mean()
    assert history[0]["loss"] == pytest.approx(nll.item(), rel=1e-8)
    assert history[0]["own_words"] == 0 and history[1]["own_words"] == 1


def test_it_brings_the_student_nearer():
    teacher, student = make_teacher(), make_student()
    config = settings(loss="reverse_kl", epochs=8.0, lr=1e-2, eval_every=100)
    history = distill(
        student, teacher, make_blocks(), valid=make_blocks(5, seed=9), config=config,
        regime=policy(teacher, teacher_mix=0.1, rollout_steps=2),
    ).history  # fmt: skip
    assert history[-1]["valid_kl"] < 0.93 * history[0]["valid_kl"]


@pytest.mark.parametrize(
    ("train", "regime", "message"),
    [
        ({}, {}, "lowers reverse_kl; found train.loss 'forward_kl'"),
        ({"loss": "reverse_kl", "temperature": 2.0}, {}, "leave the temperature at 1"),
        ({"loss": "reverse_kl"}, {"teacher_mix": 1.0}, "regime.teacher_mix must be at least 0 and below 1; found 1"),
        ({"loss": "reverse_kl"}, {"sample_temperature": 0.0}, "regime.sample_temperature 0 draws nothing"),
        ({"loss": "reverse_kl"}, {"ratio_clip": -1.0}, "regime.ratio_clip must not be negative"),
    ],
)
def test_what_it_cannot_work_with(train, regime, message):
    settings = RunConfig(train=TrainConfig(regime="policy-gradient", **train), regime=RegimeConfig(**regime))
    with pytest.raises(UserError, match=message):
        check_regime_settings(settings)
    if not regime:
        with pytest.raises(UserError, match=message):
            distill(make_student(), data=make_blocks(), config=settings.train, regime=policy(make_teacher()))
