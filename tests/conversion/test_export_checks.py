"""What cannot be exported is said before anything is built."""

from dataclasses import replace

import pytest

from moe2dense.config.schema import ExportConfig, RunConfig
from moe2dense.conversion.planning import make_plan
from moe2dense.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q8_0"}, "'q8_0' is not known for --format hf; choose int8 or int4"),
        ({"quantize": "int8", "format": "gguf"}, "'int8' is not known for --format gguf"),
        ({"quantize": "q4_k_m", "format": "gguf"}, "llama-quantize, which is not on PATH"),
    ],
)
def test_a_plan_refuses_what_the_export_would(options, message, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = RunConfig(model=str(tiny), to="3.2m", export=ExportConfig(**options))
    with pytest.raises(UserError, match=message):
        make_plan(replace(settings, out=str(tmp_path / "out")))
