"""Client and server are killed while targets are written: what had come in is asked for by no later command, and the store is the same."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.served.rows import sequences_of
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.modeling.load import load_model

from .fake_server import TeacherServer

pytestmark = pytest.mark.slow
BLOCK, K, COUNT, PARALLEL = 128, 64, 84, 2
PER_REQUEST = 2**16 // (BLOCK * (K + 1))
VLLM = os.environ.get("MOE2DENSE_VLLM", "")


def client(tiny: Path, text: Path, url: str, store: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "moe2dense", "targets", str(tiny), "--data", str(text), "--tokens", str(COUNT * BLOCK), "--block", str(BLOCK),
        "--endpoint", url, "--k", str(K), "--out", str(store), "--endpoint-parallel", str(PARALLEL),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stored(store: Path) -> set[int]:
    """The blocks whose answers lie on disk."""
    names = (part.stem.split("-") for part in (store / "parts").glob("*.safetensors"))
    return {block for start, stop in names for block in range(int(start), int(stop))}


def wait_for(store: Path, blocks: int, running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while len(stored(store)) < blocks:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[1]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def blocks(text, tokenizer):
    return load_blocks(str(text), tokenizer, BLOCK, tokens=COUNT * BLOCK)


def owners(blocks, sequences) -> list[int]:
    """The block that each sequence which a server was asked for is a document of."""
    known = {tuple(ids): number for number, _, ids in sequences_of(blocks)}
    return [known[tuple(ids)] for ids in sequences if tuple(ids) in known]


def test_what_came_in_before_a_kill_is_not_asked_for_again(tiny, text, tokenizer, blocks, tmp_path):
    model = load_model(tiny, "the teacher").eval()
    store, asked = tmp_path / "served", []
    with TeacherServer(model, tokenizer, longest=256) as server:
        first = client(tiny, text, server.url, store)
        wait_for(store, COUNT // 3, first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(2)  # the server still answers what was under way
        before_client = stored(store)
        asked.append(owners(blocks, server.asked))
        server.asked.clear()

        second = client(tiny, text, server.url, store)
        wait_for(store, 2 * COUNT // 3, second)
    _, error = second.communicate()  # it tries for 15 seconds
    before_server = stored(store)
    asked.append(owners(blocks, server.asked))
    assert second.returncode == 2 and f"the answers of {len(before_server)} of {COUNT} blocks" in " ".join(
        error.split()
    )

    with TeacherServer(model, tokenizer, longest=256) as server:
        third = client(tiny, text, server.url, store)
        _, error = third.communicate()
        assert third.returncode == 0, error
        asked.append(owners(blocks, server.asked))

    assert len(before_client) < len(before_server) < COUNT
    assert not before_client & {*asked[1], *asked[2]} and not before_server & {*asked[2]}
    under_way = PARALLEL * PER_REQUEST
    twice = sum(map(len, (set(a) for a in asked))) - COUNT
    assert 0 <= twice <= 2 * under_way
    own = open_targets(write_targets(model, blocks, tmp_path / "own", "topk", k=K), blocks)
    served = open_targets(store, blocks, tokenizer=tokenizer)
    expected, given = own.batch(range(COUNT)), served.batch(range(COUNT))
    same = expected.ids == given.ids
    assert same.float().mean() > 0.99 and (expected.log_p - given.log_p)[same].abs().max() < 0.02
    assert torch.equal(expected.ids[:, 0], given.ids[:, 0])


class RealServer:
    """vLLM in processes of its own, and how many prompt tokens it was asked for."""

    def __init__(self, tiny: Path, port: int, log: Path):
        command = [VLLM, "serve", str(tiny), "--dtype", "float32", "--max-logprobs", str(K), "--max-model-len", "256"]
        command += ["--enforce-eager", "--port", str(port), "--served-model-name", "teacher", "--max-num-seqs", "8"]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + 300
        while self.get("/v1/models") is None:
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)

    def get(self, path: str) -> str | None:
        try:
            return urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=5).read().decode()
        except OSError:
            return None

    def kill(self) -> int:
        """Kill it; return the prompt tokens that it was asked for."""
        metrics = self.get("/metrics") or ""
        counts = re.findall(r"^vllm:prompt_tokens_total\{.*\} (\S+)", metrics, re.MULTILINE)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return sum(int(float(count)) for count in counts)


@pytest.mark.skipif(not VLLM, reason="MOE2DENSE_VLLM names no vLLM")
def test_a_real_server_is_killed_and_only_what_was_under_way_is_asked_for_again(tiny, text, tmp_path):
    store, log, port = tmp_path / "served", tmp_path / "log", 8714
    server = RealServer(tiny, port, log)
    first = client(tiny, text, server.url, store)
    wait_for(store, COUNT // 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = client(tiny, text, server.url, store)
    wait_for(store, 2 * COUNT // 3, second)
    tokens = server.kill()
    assert second.wait() == 2
    server = RealServer(tiny, port, log)
    third = client(tiny, text, server.url, store)
    _, error = third.communicate()
    tokens += server.kill()
    assert third.returncode == 0, error
    under_way = 2 * PARALLEL * PER_REQUEST * BLOCK  # at the two kills
    assert tokens <= COUNT * BLOCK + under_way
