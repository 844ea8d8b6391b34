"""A teacher whose experts are all alike has an exact dense student: every shipped family, built, packed, padded and exported.

Divergences are those of `evaluate`, in float32; what rounding leaves lies below 1e-8 nats a token.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.exporting.api import export
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, make

BOUND = 1e-6  # nats a token
LENGTH = 37  # longer than the tiny families' windows and chunks
# grouped products in float32, which transformers runs one-expert hosts with, take widths that are multiples of 4
WIDTHS = {name: {"intermediate_size": 12} for name in ("olmoe", "phimoe", "minimax", "minimax_m2")}
WIDTHS |= {"gemma4_text": {"moe_intermediate_size": 12}}
BUILT: dict = {}


def exact_target(teacher, experts: int = 1) -> Target:
    """The family's host, wide enough for the shared experts and for so many routed ones, and for every dense layer."""
    card, shape = student_host(teacher.card.host), teacher_geometry(teacher.config, teacher.card)
    width = max(experts * shape.expert_width + shape.shared_width, shape.dense_width)
    config = dense_config(teacher.config.get_text_config(), card, width)
    return Target("test", "test", card, width, config, 0, shape)


def random_blocks(seed: int, layout: str = "alone") -> Blocks:
    """Four blocks of random ids: one document each, several documents each, or padded on either side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 101, (4, LENGTH), generator=generator)
    if layout == "packed":
        return Blocks(
            ids,
            document_ids=torch.tensor([[0] * 5 + [1] * 32, [0] * 36 + [1], [0] * 37, [0] * 10 + [1] * 9 + [2] * 18]),
        )
    if layout == "padded":
        mask = torch.ones(4, LENGTH, dtype=torch.bool)
        mask[0, 30:], mask[1, :9], mask[3, 3:] = False, False, False
        return Blocks(ids, attention_mask=mask)
    return Blocks(ids)


@pytest.fixture(params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """(model_type, teacher, exact student), made once for each family."""
    name = request.param
    if name not in BUILT:
        folder = tmp_path_factory.mktemp(name)
        make(name, folder, alike=True, **WIDTHS.get(name, {}))
        teacher = load_teacher(folder)
        BUILT[name] = teacher, build_student(teacher, exact_target(teacher), random_blocks(0), init="average")
    return (name, *BUILT[name])


def test_every_family_is_here():
    assert sorted(FAMILIES) == sorted(teacher_cards())


@pytest.mark.parametrize("layout", ["alone", "packed", "padded"])
def test_the_student_is_the_teacher(family, layout):
    name, teacher, student = family
    if layout == "packed" and not teacher_cards()[name].packing:
        pytest.skip("carries state across documents, and says so (tests/modeling/test_documents.py)")
    scores = evaluate(student, teacher, random_blocks(1, layout), bootstrap=0)
    assert float(scores.kl) <= BOUND and scores.agreement > 0.99


@pytest.mark.parametrize(
    ("init", "experts"), [("weighted-average", 1), ("aligned-average", 1), ("concat", 2), ("cluster", 2)]
)
def test_other_methods_find_it_too(family, init, experts):
    _, teacher, _ = family
    student = build_student(teacher, exact_target(teacher, experts), random_blocks(0), init=init)
    assert float(evaluate(student, teacher, random_blocks(1), bootstrap=0).kl) <= BOUND


def test_the_export_is_the_teacher_in_plain_transformers(family, tmp_path):
    _, teacher, student = family
    export(student.model, tmp_path / "out", dtype="float32", card=student.card)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert float(evaluate(plain, teacher, random_blocks(2), bootstrap=0).kl) <= BOUND


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"], indirect=True)
def test_a_build_on_packed_and_padded_text_is_exact_in_every_layer_and_when_it_is_healed(family, layout):
    _, teacher, _ = family
    data, config = random_blocks(3, layout), BuildConfig(heal_epochs=1, heal_batch=LENGTH, hold_out=0.3)
    student = build_student(teacher, exact_target(teacher), data, init="average+heal", config=config)
    layers, healed = student.history[:-1], student.history[-1]
    assert len(layers) == 3 and all(record["error"] < 1e-8 for record in layers)
    assert healed["heal_kl_before"] <= BOUND and healed["heal_kl_after"] <= BOUND
