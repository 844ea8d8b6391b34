"""Every family through a whole conversion: build, training, report and export, then the export read by transformers alone."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe2dense as m2d
from moe2dense.data.blocks import Blocks
from moe2dense.evaluation.api import evaluate
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, make
from tests.teacher.test_text_towers import WHOLE, multimodal

ROOT = Path(__file__).parents[2]
EXAMPLE, TEXT = ROOT / "examples" / "tiny-mixtral", ROOT / "examples" / "text"
WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
    "shared_intermediate_size", "dense_intermediate_size",
)  # fmt: skip
SETTINGS = """
[data]
eval_blocks = 8
[build]
min_tokens = 1024
local_steps = 10
layer_steps = 4
heal_epochs = 1.0
[train]
save_every = 100000
eval_every = 100000
[evaluate]
samples = 0
[export]
dtype = "float32"
"""


@pytest.fixture
def teacher(request, tmp_path):
    """A random teacher of the family with the example's tokenizer."""
    family = request.param
    wide = {name: 96 for name in WIDTHS if name in FAMILIES[family]}
    make(family, tmp_path / "t", vocab_size=4096, pad_token_id=2, **wide)
    copy_tokenizer(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.slow
@pytest.mark.parametrize("teacher", sorted(FAMILIES), indirect=True)
def test_convert(teacher, tmp_path):
    convert(teacher, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "student"), [("qwen3_5_moe", "qwen3_5_text"), ("qwen3_vl_moe", "qwen3")])
@pytest.mark.filterwarnings("ignore:.*tensors are ignored")
def test_convert_the_language_model_of_a_multimodal_checkpoint(model_type, student, tmp_path):
    text = WHOLE[model_type][1]
    wide = {name: 96 for name in WIDTHS if name in text}
    multimodal(model_type, tmp_path / "t", vocab_size=4096, pad_token_id=2, **wide)
    copy_tokenizer(tmp_path / "t")
    assert convert(tmp_path / "t", tmp_path).config.model_type == student


def copy_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)


def convert(teacher, tmp_path):
    """Convert a teacher, check what is there, and return the export as transformers alone reads it."""
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    done = m2d.convert(
        str(teacher), to="90%", data=str(TEXT), tokens="2k", block=64, memory="500MB", out=tmp_path / "out",
        control=False, config=settings,
    )  # fmt: skip
    assert {"model", "report.html", "report.json"} <= {path.name for path in done.out.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(done.out / "model", dtype=torch.float32)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    ids = torch.randint(3, 4096, (2, 33), generator=torch.Generator().manual_seed(0))
    scores = evaluate(model, load_teacher(teacher), Blocks(ids), bootstrap=0)
    assert 0 < float(scores.kl) < math.log(4096)  # nearer than answers that know nothing
    return model
