"""Whole conversions on a pretended GPU: nothing meets a tensor of another device, and the CPU does next to none of the products."""

import pytest

from tests.device.runs import convert, make_teacher
from tests.teacher.families import FAMILIES


def test_one_conversion(tmp_path, mostly_there):
    """From the plan to the export; the others, of every family, option, method and regime, are slow."""
    teacher = make_teacher("mixtral", tmp_path / "teacher")
    quick = "[build]\nlocal_steps = 1\nheal_epochs = 0.5\n[evaluate]\nsamples = 0\n[data]\neval_blocks = 1"
    result, counts = convert(teacher, tmp_path, "ram", more=quick, tokens="2k", init="select+refit+heal")
    assert (result.model / "config.json").is_file()
    mostly_there(counts)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["gpu", "ram", "disk"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family, where, tmp_path, mostly_there):
    teacher = make_teacher(family, tmp_path / "teacher")
    result, counts = convert(teacher, tmp_path, where, more="[evaluate]\nskills = 2" if where == "ram" else "")
    assert (result.model / "config.json").is_file()
    mostly_there(counts)


OPTIONS = {
    "resident": {"experts": "grouped_mm"},
    "streamed": {"experts": "streamed"},
    "control": {"control": True},
    "adapters": {"lora": 4},
    "sweeps": {"more": "[build]\nsweeps = 2"},
    "alternate layers": {"more": '[build]\ndepth = "alternate"'},
    "features": {"more": '[train]\nfeatures = "mse:uniform@0.1"'},
    "token weights": {"more": '[train]\ntoken_weights = "router-entropy"'},
    "labels": {"alpha": 0.5},
    "reverse": {"loss": "reverse_kl"},
    "temperature": {"temperature": "auto"},
    "selection": {"more": '[train]\nselect = "divergence:0.5"'},
    "coreset": {"more": '[train]\nselect = "coreset:0.5"'},
    "topk": {"more": '[train]\ntarget_format = "topk"'},
    "sampled": {"more": '[train]\ntarget_format = "sampled"'},
    "rounded teacher": {"more": '[teacher]\nquantize = "int4"'},
    "more experts": {"more": "[teacher]\ntop_k = 3"},
    "drawn experts": {"more": "[teacher]\ndraws = 2"},
    "int8": {"quantize": "int8"},
    "stages": {"stages": "98%,95%", "to": None},
    "written text": {"more": "[write]\nshare = 0.25\nprompt_tokens = 4"},
}
INITS = (
    "random",
    "average",
    "weighted-average",
    "aligned-average",
    "svd",
    "concat",
    "cluster",
    "select",
    "obs+refit+local+layer",
)
REGIMES = ("on-policy", "policy-gradient", "ema", "mutual", "online", "multiview", "mtp")


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("where", ["gpu", "ram"])
def test_every_option(options, where, tmp_path, mostly_there):
    where = "gpu" if options.get("experts") == "grouped_mm" else where  # which is a resident teacher's
    sizes = {"hidden_size": 32, "intermediate_size": 32} if options.get("experts") == "grouped_mm" else {}
    teacher = make_teacher("mixtral", tmp_path / "teacher", **sizes)
    _, counts = convert(teacher, tmp_path, where, **options)
    mostly_there(counts)


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_every_init(init, tmp_path, mostly_there):
    _, counts = convert(make_teacher("qwen2_moe", tmp_path / "teacher"), tmp_path, "ram", init=init)
    mostly_there(counts)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime, tmp_path, mostly_there):
    teacher = make_teacher("mixtral", tmp_path / "teacher")
    loss = "reverse_kl" if regime == "policy-gradient" else "forward_kl"
    _, counts = convert(teacher, tmp_path, "ram", more=f'[train]\nregime = "{regime}"', loss=loss)
    mostly_there(counts)
