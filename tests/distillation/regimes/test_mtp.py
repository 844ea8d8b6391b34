"""Heads for the tokens after the next one, against the formula written out, in float64."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from moe2dense.config.schedules import learning_rate
from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.regimes.mtp import HEADS_FILE, Heads, keep_heads_of, load_heads, pairs
from moe2dense.errors import UserError
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights

DOUBLE = torch.float64


def mtp(**options):
    return make_regime(
        "mtp", RegimeConfig(**({"heads": 2, "head_weight": "linear:0.5:0.1", "trunk": "linear:0:0.5"} | options))
    )


@pytest.mark.parametrize("trunk", [0.0, 0.25, 1.0])
def test_equals_a_hand_written_loop(trunk):
    """Teacher's distribution at t + j against x + silu(W x) at t through the student's own head; `trunk` of the slope goes on."""
    teacher, student, blocks = make_teacher(DOUBLE), make_student(DOUBLE), make_blocks()
    result = distill(
        student, teacher, blocks, config=settings(micro_batch=3, temperature=1.5), seed=5, regime=mtp(trunk=str(trunk))
    )
    other, heads = make_student(DOUBLE), Heads(2, 24).double()
    parameters = [*other.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)
    for step in range(6):
        ids = blocks.input_ids[step_blocks(24, 4, step, 5)]
        with torch.no_grad():
            p = (teacher(ids).logits / 1.5).softmax(-1)
        hidden = other.model(ids).last_hidden_state
        total, seen = 0.0, []
        for j in range(3):
            under = hidden if j == 0 else trunk * hidden + (1 - trunk) * hidden.detach()
            own = other.lm_head.weight
            own = own if j == 0 else trunk * own + (1 - trunk) * own.detach()
            state = under if j == 0 else under + F.silu(under @ heads.maps[j - 1].weight.T)
            log_q = (state @ own.T / 1.5).log_softmax(-1)[:, : 12 - j]
            kl = 1.5**2 * (p[:, j:] * (p[:, j:].log() - log_q)).sum() / 48  # over the step's tokens
            seen.append(kl.item())
            total = total + kl * (1 if j == 0 else (0.5 - 0.08 * step) / 2)
        record = result.history[step]
        assert [record["parts"]["kd"], record["head_1"], record["head_2"]] == pytest.approx(seen, rel=1e-8)
        assert record["loss"] == pytest.approx(total.item(), rel=1e-8)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 3e-3, 0.03)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


def test_pairs_stay_in_their_document_and_count_by_their_target():
    ids = torch.arange(14).view(2, 7)
    documents = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    mask = torch.ones(14, dtype=torch.bool)
    mask[12] = False
    here, there = pairs({"input_ids": ids, "position_ids": documents}, mask, 2)
    assert list(zip(here.tolist(), there.tolist(), strict=True)) == [
        (0, 2), (3, 5), (4, 6), (7, 9), (8, 10), (9, 11), (11, 13),
    ]  # fmt: skip
    here, _ = pairs({"input_ids": ids, "attention_mask": documents.gt(0).long()}, None, 3)
    assert here.tolist() == [1, 2, 8, 9, 10]
    assert len(pairs({"input_ids": ids}, None, 7)[0]) == 0


class Stop(Exception):
    pass


def test_heads_resume_and_are_kept_apart_from_the_student(tmp_path):
    def run(out, student, **more):
        return distill(
            student, make_teacher(), make_blocks(), valid=make_blocks(5, seed=9), config=settings(save_every=2), out=out,
            regime=mtp(keep_heads=True), **more,
        )  # fmt: skip

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == 3:
            raise Stop

    whole, resumed = make_student(), make_student()
    result = run(tmp_path / "whole", whole)
    with pytest.raises(Stop):
        run(tmp_path / "part", make_student(), progress=stop)
    run(tmp_path / "part", resumed, resume=True)
    assert same(weights(whole), weights(resumed)) and weights(whole).keys() == weights(make_student()).keys()
    first, second = (load_file(tmp_path / k / HEADS_FILE) for k in ("whole", "part"))
    assert same(first, second) and all(v.abs().sum() > 0 for v in first.values())
    heads = load_heads(tmp_path / "whole")
    assert same(heads.state_dict(), first) and len(heads.maps) == 2
    plain = distill(make_student(), make_teacher(), make_blocks(), valid=make_blocks(5, seed=9), config=settings())
    assert plain.history[0]["valid_kl"] == result.history[0]["valid_kl"]  # heads do not enter what is measured


def test_an_earlier_checkpoints_heads_take_the_place_of_the_last_steps(tmp_path):
    """They go with the student that is exported."""
    distill(
        make_student(),
        make_teacher(),
        make_blocks(),
        config=settings(save_every=6),
        out=tmp_path,
        regime=mtp(keep_heads=True),
    )
    last, folder = load_heads(tmp_path).state_dict(), Checkpoints(tmp_path / "checkpoints")
    weights, _, _ = folder.load(6)
    assert same(
        load_heads(tmp_path).state_dict(), {f"maps.{j}.weight": weights[f"extra.heads.maps.{j}.weight"] for j in (0, 1)}
    )
    earlier = {name: value * 0.5 for name, value in weights.items()}
    keep_heads_of(earlier, tmp_path)
    assert same(load_heads(tmp_path).state_dict(), {name: value * 0.5 for name, value in last.items()})
    (tmp_path / HEADS_FILE).unlink()
    keep_heads_of(earlier, tmp_path)  # a run that keeps none
    keep_heads_of({"model.norm.weight": torch.ones(2)}, tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()


def test_heads_learn_to_look_ahead():
    """A teacher of a cycle: what comes two and three tokens later is as sure as what comes next."""
    ids = (
        torch.arange(12).repeat(24, 1).add(torch.randint(0, 61, (24, 1), generator=torch.Generator().manual_seed(0)))
        % 61
    )
    blocks = make_blocks()
    blocks.input_ids = ids
    teacher = make_student()
    distill(teacher, data=blocks, config=settings(alpha=1.0, epochs=60.0, lr=1e-2))
    result = distill(
        make_student(), teacher, blocks, config=settings(epochs=60.0, lr=1e-2), regime=mtp(head_weight="1", trunk="1")
    )
    first, last = result.history[0], result.history[-1]
    assert last["head_1"] < 0.2 * first["head_1"] and last["head_2"] < 0.2 * first["head_2"]


def test_what_it_cannot_work_with(tmp_path):
    with pytest.raises(UserError, match="train.alpha must stay below 1"):
        distill(make_student(), data=make_blocks(), config=settings(alpha=1.0), regime=mtp())
    with pytest.raises(UserError, match="regime.heads must be at least 1"):
        mtp(heads=0)
    with pytest.raises(UserError, match="regime.head_weight must not be negative"):
        mtp(head_weight="linear:1:-1")
    with pytest.raises(UserError, match="regime.trunk must lie between 0 and 1"):
        mtp(trunk="2")
    with pytest.raises(UserError, match="train with regime mtp and keep_heads"):
        load_heads(tmp_path)
