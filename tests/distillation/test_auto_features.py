"""Which runs follow the teacher's hidden states without being told to."""

import dataclasses

import pytest
import torch

from moe2dense.config.training import AUTO_FEATURES, TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.auto_features import settle_features
from moe2dense.distillation.checks import check_training
from moe2dense.distillation.cost import features_to_store
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.losses.feature_spec import feature_weights, teacher_features
from moe2dense.student.build.api import build_student
from moe2dense.teacher.load import load_teacher

# N blocks, S block length


@pytest.fixture(scope="module")
def setting(root):
    teacher = load_teacher(root / "examples" / "tiny-mixtral")
    data = Blocks(torch.randint(5, 4000, (4, 19), generator=torch.Generator().manual_seed(0)))
    return teacher, build_student(teacher, "50%", data, init="select"), data


class Brings:
    brings_targets = True


def test_a_student_made_of_the_teacher_follows_its_states(setting, tmp_path):
    teacher, student, data = setting
    config = TrainConfig()
    assert settle_features(config, student, None, teacher, None).features == AUTO_FEATURES["auto"]
    targets = hidden_targets(teacher, data, features=range(4))
    assert settle_features(config, student, targets, None, None).features == AUTO_FEATURES["auto"]
    write_targets(teacher, data, tmp_path / "t", features=range(4))
    stored = open_targets(tmp_path / "t", data)
    assert settle_features(config, student, stored, None, None).features == AUTO_FEATURES["auto"]


def test_a_falling_weight_starts_at_the_constant_one_and_ends_at_none(setting):
    teacher, student, data = setting
    falling = TrainConfig(features="auto-falling")
    check_training(falling)
    chosen = settle_features(falling, student, hidden_targets(teacher, data, features=range(4)), None, None).features
    of_step = [feature_weights(chosen, "", step, 11) for step in (0, 5, 10)]
    assert of_step[0] == feature_weights(AUTO_FEATURES["auto"], "", 0, 11)
    assert of_step[1] == (of_step[0][0] / 2,) and not any(of_step[2])
    assert teacher_features(chosen, 4, 4) == teacher_features(AUTO_FEATURES["auto"], 4, 4)


@pytest.mark.parametrize(
    "case", ["plain model", "own checkpoint", "narrower", "states not held", "hard labels", "own text", "nothing"]
)
def test_others_do_not(case, setting):
    teacher, student, data = setting
    config, targets, regime = TrainConfig(), None, None
    if case == "plain model":
        student = student.model
    if case == "own checkpoint":
        student = dataclasses.replace(student, method="checkpoint")
    if case == "narrower":
        student = build_student(teacher, "25%", data, init="select")
    if case == "states not held":
        targets = hidden_targets(teacher, data, features=range(3))
    if case == "hard labels":
        config = TrainConfig(alpha=1.0)
    if case == "own text":
        regime = Brings()
    if case == "nothing":
        teacher = None
    assert settle_features(config, student, targets, teacher, regime).features == ""


def test_what_is_asked_for_stays(setting):
    teacher, student, _ = setting
    for asked in ("", "cosine:last:1@0.2"):
        config = TrainConfig(features=asked)
        assert settle_features(config, student.model, None, teacher, Brings()) is config


def test_the_loss_counts_the_states(setting):
    """Training by default differs from training without features."""
    import copy

    teacher, student, data = setting
    weights = {}
    for features in ("auto", ""):
        copied = copy.deepcopy(student)
        distill(copied, teacher, data, config=TrainConfig(features=features, batch=19, save_every=99, eval_every=99))
        weights[features] = [p.detach() for p in copied.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))


def test_the_store_of_a_run_holds_them(setting, root):
    from moe2dense.student.target.resolve import resolve_target

    teacher = setting[0]
    wide, narrow = (resolve_target(to, teacher.config, teacher.card) for to in ("50%", "25%"))
    assert features_to_store(TrainConfig(), wide) == AUTO_FEATURES["auto"]
    assert features_to_store(TrainConfig(), narrow) == ""
    assert features_to_store(TrainConfig(target_format="sampled"), wide) == ""
    assert features_to_store(TrainConfig(features="mse:last:1"), narrow) == "mse:last:1"
