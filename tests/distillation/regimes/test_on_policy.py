"""On-policy distillation: what the student writes, what the teacher says of it, when, and that it resumes bit by bit."""

import random

import pytest
import torch

from moe2dense.common.seeds import uniforms
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import RegimeConfig, TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.regimes.checks import check_regime_settings
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.on_policy import own_steps
from moe2dense.errors import UserError
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling, nucleus
from tests.distillation.regimes.kills import run_killed
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights

OPTIONS = RegimeConfig(share="0.5", rollout_steps=3, prompt=0.3, top_p=0.9)


def regime(teacher, **options):
    return make_regime(
        "on-policy", RegimeConfig(**({"share": "0.5", "rollout_steps": 3, "prompt": 0.3} | options)), teacher
    )


@pytest.mark.parametrize("sampling", [Sampling(seed=4), Sampling(0.7, 0.8, seed=9), Sampling(0.0)])
def test_continuations_equal_the_model_read_from_the_start_each_time(sampling):
    """No cache, one row at a time, the same random numbers."""
    model, ids, numbers = make_student(torch.float64), make_blocks(5, 11).input_ids, [7, 0, 123456, 3, 2]
    written = continued(model.train(), ids, 4, sampling, numbers)
    assert model.training and torch.equal(written[:, :4], ids[:, :4])
    model.eval()
    for row, number in enumerate(numbers):
        text, drawn = ids[row, :4].tolist(), uniforms(sampling.seed, number, 7)
        for u in drawn:
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1]
            if sampling.temperature == 0:
                text.append(int(logits.argmax()))
                continue
            p = nucleus((logits / sampling.temperature).softmax(-1)[None], sampling.top_p)[0]
            text.append(int((p.cumsum(0) > u * p.sum()).nonzero()[0]))
        assert written[row].tolist() == text
    alone = continued(model, ids[2:3], 4, sampling, numbers[2:3])
    assert torch.equal(alone[0], written[2])


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [("0", 5, 0), ("1", 5, 5), ("0.5", 8, 4), ("0.25", 8, 2), ("linear:0:1", 101, 50), ("step:0:1", 10, 5)],
)
def test_share_of_steps_on_own_words(share, steps, expected):
    own = own_steps(share, steps)
    assert sum(own) == expected and len(own) == steps
    if share == "0.5":
        assert own == [False, True] * 4
    if share.startswith("linear"):
        assert sum(own[:50]) < sum(own[50:]) / 2
    if share.startswith("step"):
        assert not any(own[:5]) and all(own[5:])


def test_targets_are_the_teachers_on_the_text_that_was_written():
    """Every batches of a run, against the teacher's own forward, the student's continuation at the window's start, and its loss."""
    teacher, student, blocks = make_teacher(torch.float64), make_student(torch.float64), make_blocks()
    on_policy = regime(teacher)
    asked, plain, at_start, prompt = [], on_policy.batches_for, {}, 4

    def look(step, batches, plan):
        if step % 3 == 0:
            at_start[step // 3] = make_student(torch.float64)
            at_start[step // 3].load_state_dict(student.state_dict())
        batches, plan = plain(step, batches, plan)
        asked.append((step, batches, plan))
        return batches, plan

    on_policy.batches_for = look
    config = settings(alpha=0.25, epochs=1.0)
    result = distill(student, data=blocks, config=config, seed=5, regime=on_policy)
    assert result.steps == 6 and [r["own_words"] for r in result.history] == [0, 1, 0, 1, 0, 1]
    for step, batches, plan in asked:
        text = blocks.input_ids[step_blocks(24, 4, step, 5)]
        own = bool(step % 2)
        if own:
            numbers = [step * 4 + i for i in range(4)]
            text = continued(at_start[step // 3], text, prompt, Sampling(seed=5), numbers)
            assert not torch.equal(text, blocks.input_ids[step_blocks(24, 4, step, 5)])
        assert torch.equal(batches.blocks.input_ids, text) and plan.indices == [0, 1, 2, 3]
        assert plan.alpha == (0 if own else 0.25)
        expected = torch.zeros(4, 12, dtype=torch.bool) if own else torch.ones(4, 12, dtype=torch.bool)
        if own:
            expected[:, prompt - 1 : -1] = True  # what predicts a word that it wrote
        assert torch.equal(batches.mask, expected)
        with torch.no_grad():
            torch.testing.assert_close(
                batches.targets.head.logits(batches.targets.hidden), teacher(text).logits, rtol=1e-9, atol=1e-9
            )


def test_the_loss_is_the_generalised_jsd_on_generated_positions():
    teacher, student, blocks = make_teacher(torch.float64), make_student(torch.float64), make_blocks(4)
    before = make_student(torch.float64)
    config = settings(loss="jsd:0.3", batch=48)
    first = distill(student, data=blocks, config=config, regime=regime(teacher, share="1")).history[0]
    text = continued(before, blocks.input_ids[step_blocks(4, 4, 0, 0)], 4, Sampling(seed=0), [0, 1, 2, 3])
    with torch.no_grad():
        p, q = (m(text).logits[:, 3:-1].softmax(-1) for m in (teacher, before))
    m = 0.3 * p + 0.7 * q
    jsd = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    assert first["loss"] == pytest.approx(jsd.mean().item(), rel=1e-9)


def test_the_whole_block_carries_loss_where_asked():
    teacher, blocks = make_teacher(), make_blocks(4)
    on_policy = regime(teacher, share="1", generated_only=False)
    seen, plain = [], on_policy.batches_for
    on_policy.batches_for = lambda *a: seen.append(plain(*a)) or seen[-1]
    distill(make_student(), data=blocks, config=settings(), regime=on_policy)
    assert seen[0][0].mask.all()


def test_chats_end_where_the_student_closes_its_turn():
    teacher, student = make_teacher(), make_student()
    student.config.eos_token_id = 3
    learnt = torch.ones(8, 12, dtype=torch.bool)
    blocks = Blocks(torch.zeros(8, 12, dtype=torch.int64), labels_mask=learnt)
    on_policy = regime(teacher, share="1", prompt=0.25)
    distill(student, data=blocks, config=settings(batch=96), regime=on_policy)
    text = torch.tensor([[0, 0, 0, 9, 3, 5, 3, 1, 1, 1, 1, 1], [3, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    mask = on_policy._with_learnt_words(Blocks(text, labels_mask=learnt[:2])).labels_mask
    assert mask[0].tolist() == [False] * 3 + [True] * 2 + [False] * 7
    assert mask[1].tolist() == [False] * 3 + [True] * 9


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, student = tmp_path_factory.mktemp("straight"), make_student()
    result = distill(student, make_teacher(), make_blocks(), **run_options(folder))
    return weights(student), result, folder


def run_options(out):
    return dict(
        valid=make_blocks(5, seed=9), config=settings(epochs=2.0, save_every=2), seed=3, out=out,
        regime=make_regime("on-policy", OPTIONS, make_teacher()),
    )  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_resumed_in_the_middle_of_a_rollout_is_bit_exact(straight, tmp_path, stop_at):
    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == stop_at:
            raise Stop

    with pytest.raises(Stop):
        distill(make_student(), make_teacher(), make_blocks(), progress=stop, **run_options(tmp_path))
    student = make_student()
    result = distill(student, make_teacher(), make_blocks(), resume=True, **run_options(tmp_path))
    assert same(weights(student), straight[0])
    keys = ("step", "loss", "valid_kl", "own_words")
    assert [[r.get(k) for k in keys] for r in result.history] == [[r.get(k) for k in keys] for r in straight[1].history]
    assert result.unique == result.tokens == 12 * 48


def test_passed_rollouts_are_dropped_and_other_options_refused(straight, tmp_path):
    assert [p.name for p in (straight[2] / "rollouts").iterdir()] == []
    options = run_options(straight[2]) | {"regime": make_regime("on-policy", RegimeConfig(share="0.1"), make_teacher())}
    with pytest.raises(UserError, match=r"made with regime share=0.5 \(now 0.1\)"):
        distill(make_student(), make_teacher(), make_blocks(), resume=True, **options)


def to_the_end(out, final, progress):
    student = make_student()
    distill(student, make_teacher(), make_blocks(), **run_options(out), progress=progress, resume=True)
    torch.save(student.state_dict(), final)


@pytest.mark.slow
def test_killed_runs_go_on_bit_exactly(straight, tmp_path):
    rng, killed = random.Random(1), 0
    for attempt in range(4):
        final = tmp_path / f"{attempt}.pt"
        killed += run_killed(to_the_end, (tmp_path / str(attempt),), final, rng, steps=9)
        assert same(torch.load(final, weights_only=True), straight[0])
    assert killed >= 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "1.5"}, "regime.share must lie between 0 and 1; found '1.5'"),
        ({"share": "half"}, "schedule 'half' is not a number"),
        ({"prompt": 1.0}, "regime.prompt must lie between 0 and 1"),
        ({"top_p": 0.0}, "regime.top_p must lie between 0 and 1"),
        ({"rollout_steps": 0}, "regime.rollout_steps must be at least 1"),
        ({"sample_temperature": -1.0}, "regime.sample_temperature must not be negative"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("(", r"\(")):
        make_regime("on-policy", RegimeConfig(**options), make_teacher())


def test_what_it_cannot_work_with():
    teacher, blocks = make_teacher(), make_blocks()
    with pytest.raises(UserError, match="needs the teacher itself"):
        make_regime("on-policy", OPTIONS)
    with pytest.raises(UserError, match="is unknown .did you mean 'on-policy'"):
        make_regime("onpolicy")
    mask = torch.ones(24, 12, dtype=torch.bool)
    mask[3, 9:] = False
    with pytest.raises(UserError, match="without padding"):
        distill(make_student(), data=make_blocks(attention_mask=mask), config=settings(), regime=regime(teacher))
    with pytest.raises(UserError, match="features belong to fixed text"):
        distill(make_student(), teacher, blocks, config=settings(features="mse:uniform"), regime=regime(teacher))
    with pytest.raises(UserError, match="leave shard out"):
        distill(make_student(), teacher, blocks, config=settings(shard=True), regime=regime(teacher))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"features": "mse:uniform"}, "train.features belongs to the teacher's answers on fixed text"),
        ({"select": "divergence:0.5"}, "train.select belongs"),
        ({"targets": "somewhere"}, "train.targets belongs"),
        ({"temperature_schedule": "auto"}, "auto is chosen on fixed text"),
        ({"shard": True}, "train.shard spreads one model"),
    ],
)
def test_a_run_is_refused_before_it_begins(train, message):
    with pytest.raises(UserError, match=message):
        check_regime_settings(RunConfig(train=TrainConfig(regime="on-policy", **train)))
    if "shard" not in train:
        check_regime_settings(RunConfig(train=TrainConfig(regime="ema", **train)))
