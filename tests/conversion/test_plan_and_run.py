"""What a plan says is what the run counts: FLOPs and bytes of every stage within 5 per cent, on a teacher of a real one's proportions."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe2dense as m2d
from moe2dense.common.costs import Cost
from moe2dense.config.toml import read_config
from moe2dense.conversion.planning import make_plan
from moe2dense.families.machines import Machine

MACHINE = Machine("a machine", single=1e11, disk=1e9, memory=64e9, host_memory=64e9)
# one ridge, and rates at which no fit starts again: how often those are tried only data can tell
SETTINGS = """
[data]
path = "{text}"
eval_blocks = 8
block = 64
[build]
min_tokens = 2048
local_steps = 12
local_batch = 256
local_lr = 1e-4
layer_steps = 4
layer_lr = 1e-5
heal_lr = 1e-5
heal_epochs = 1.0
ridge = 0.01
[train]
tokens = 8192
batch = 512
lr = 1e-4
[evaluate]
samples = 0
skills = 0
"""


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory) -> Path:
    """A random Mixtral of two layers whose FFNs are 3.5 times as wide as its hidden states."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=4096, hidden_size=128, intermediate_size=448, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.08)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


CASES = {
    "resident": {},
    "streamed": {"memory": "16MB"},
    "rolling targets": {"targets_disk": "2MB"},
    "a control": {"control": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_plan_and_run_agree(case, wide, text, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS.format(text=text))
    m2d.convert(str(wide), to="70%", out=tmp_path / "out", config=settings, **CASES[case])
    plan = make_plan(read_config(tmp_path / "out/moe2dense.toml"), MACHINE)
    run = json.loads((tmp_path / "out/run.json").read_text())
    counted = {name: Cost(**entry) for name, entry in run["cost"].items()}
    assert set(counted) == set(plan.stages)
    for name, cost in counted.items():
        stage = plan.stages[name]
        assert stage.all_flops == pytest.approx(sum(cost.flops.values()), rel=0.05), name
        assert stage.read == pytest.approx(cost.disk, rel=0.05), name
    if case == "rolling targets":
        assert plan.stages["train-student"].read > cost.disk and "targets" not in plan.stages
