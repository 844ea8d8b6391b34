"""Targets of a teacher that a server runs: the same numbers as its own, nothing asked twice, and one sentence for what goes wrong."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moe2dense.common.http import RateLimit
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.served.server import connect
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.distillation.targets.store import open_targets, read_manifest
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError

from .fake_server import TeacherServer

K, S = 7, 11


@pytest.fixture(scope="module")
def teacher(tokenizer):
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.fixture
def blocks(tokenizer):
    return Blocks(torch.randint(3, len(tokenizer), (6, S)))


def reach(server, k=K, **options):
    return connect(server.url, k, **{"wait": 0.01, "timeout": 5.0, "tries": 3, "parallel": 2} | options)


def write(server, blocks, tokenizer, folder, **options):
    write_served_targets(reach(server, **options), blocks, tokenizer, folder)
    return open_targets(folder, blocks)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp"])
def test_a_served_teacher_gives_its_own_top_k(kind, teacher, blocks, tokenizer, tmp_path):
    own = open_targets(write_targets(teacher, blocks, tmp_path / "own", "topk", k=K), blocks)
    with TeacherServer(teacher, tokenizer, kind) as server:
        stored = write(server, blocks, tokenizer, tmp_path / "served")
    for i in range(len(blocks)):
        ours, theirs = own.batch([i]), stored.batch([i])
        assert torch.equal(ours.ids, theirs.ids) and theirs.temperature == 1.0
        torch.testing.assert_close(theirs.log_p, ours.log_p, rtol=2e-3, atol=2e-3)
    source = read_manifest(tmp_path / "served")["source"]
    assert source["kind"] == kind and source["model"] == "teacher" and source["server_version"]
    assert source["begun"] <= source["answered"] and f"{K} likeliest" in source["log_probabilities"]
    assert "reads" in source["tokenizer"] and not (tmp_path / "served" / "parts").exists()


def test_documents_are_asked_for_apart_and_padding_not_at_all(teacher, tokenizer, tmp_path):
    ids = torch.randint(3, len(tokenizer), (2, S))
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * S], dtype=torch.int32)
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[1, 8:] = False
    blocks = Blocks(ids, attention_mask=mask, document_ids=documents)
    with TeacherServer(teacher, tokenizer) as server:
        stored = write(server, blocks, tokenizer, tmp_path)
        assert sorted(map(len, server.asked)) == [4, 7, 8]
    with torch.no_grad():
        second = teacher(ids[:1, 4:]).logits[0].log_softmax(-1).topk(K)
        padded = teacher(ids[1:, :8]).logits[0].log_softmax(-1).topk(K)
    assert torch.equal(stored.batch([0]).ids[4:], second.indices)
    assert torch.equal(stored.batch([1]).ids[:8], padded.indices)
    assert (stored.batch([1]).log_p[8:].exp().sum(-1) < 1e-6).all()


def small_requests(monkeypatch):
    """One block a request."""
    monkeypatch.setattr("moe2dense.distillation.targets.served.write._REQUEST_NUMBERS", 1)


def broken(data, status=200, headers=None, length=None):
    return status, data, headers, length


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (broken(b"busy", 500), "HTTP 500: busy"),
        (broken(b"later", 429, {"Retry-After": "0"}), "HTTP 429: later"),
        (broken(b'{"choices": [{"index"', length=90), "half an answer"),
        (broken(b'{"choices": [{"inde'), "no JSON"),
        (broken(b"<html>"), "no JSON"),
        (broken(b'{"choices": []}'), "choices: 0 entries where 1 were asked for"),
        (broken(b'{"choices": null}'), "choices"),
        (broken(b"[3]"), "another form than vllm's"),
        (broken(b'{"choices": [{"index": 0, "prompt_logprobs": [null]}]}'), "prompt_logprobs: 1 entries where 11"),
        (broken(b""), "no JSON"),
    ],
    ids=["500", "429", "half body", "half json", "junk", "no choice", "null", "list", "half", "empty"],
)
def test_faults_end_in_one_sentence_and_nothing_is_asked_twice(
    fault, message, teacher, blocks, tokenizer, tmp_path, monkeypatch
):
    small_requests(monkeypatch)
    ill = True
    bad = blocks.input_ids[4].tolist()

    def behave(number, path, body):
        return fault if ill and body["prompt"] == [bad] else None

    with TeacherServer(teacher, tokenizer, fault=behave) as server:
        with pytest.raises(UserError) as caught:
            write(server, blocks, tokenizer, tmp_path)
        sentence = str(caught.value)
        assert message in sentence and "3 times" in sentence and "\n" not in sentence
        kept = len(server.asked)
        assert f"the answers of {kept} of 6 blocks are in" in sentence and 4 <= kept <= 5
        with pytest.raises(UserError, match="unfinished"):
            open_targets(tmp_path, blocks)
        ill = False
        stored = write(server, blocks, tokenizer, tmp_path)
        assert sorted(server.asked) == sorted(blocks.input_ids.tolist())  # each once
    with torch.no_grad():
        expected = teacher(blocks.input_ids[4:5]).logits[0].log_softmax(-1).topk(K).indices
    assert torch.equal(stored.batch([4]).ids, expected)


def test_a_fault_that_passes_is_tried_again(teacher, blocks, tokenizer, tmp_path, monkeypatch):
    small_requests(monkeypatch)
    with TeacherServer(teacher, tokenizer, fault=lambda n, *_: broken(b"no", 503) if n % 2 == 0 else None) as server:
        write(server, blocks, tokenizer, tmp_path, parallel=1)
        assert server.tries == 12 and len(server.asked) == 6


def test_a_server_that_goes_away_and_comes_back_elsewhere(teacher, blocks, tokenizer, tmp_path, monkeypatch):
    small_requests(monkeypatch)
    with TeacherServer(teacher, tokenizer) as server:
        first = reach(server, parallel=1, tries=1)
        server.fault = lambda n, *_: server.server.server_close() or broken(b"", 500) if n == 2 else None
        with pytest.raises(UserError, match="the answers of 2 of 6 blocks"):
            write_served_targets(first, blocks, tokenizer, tmp_path)
    with pytest.raises(UserError, match="is the server up"):
        reach(server, tries=1)
    with TeacherServer(teacher, tokenizer) as other:
        write(other, blocks, tokenizer, tmp_path)
        assert len(other.asked) == 4


def test_a_damaged_part_is_asked_for_again(teacher, blocks, tokenizer, tmp_path, monkeypatch):
    small_requests(monkeypatch)
    with TeacherServer(teacher, tokenizer, fault=lambda n, *_: broken(b"", 500) if n >= 5 else None) as server:
        with pytest.raises(UserError, match="5 of 6 blocks"):
            write(server, blocks, tokenizer, tmp_path, parallel=1, tries=1)
        part = sorted((tmp_path / "parts").iterdir())[1]
        part.write_bytes(part.read_bytes()[:40])
        server.fault = lambda *_: None
        write(server, blocks, tokenizer, tmp_path)
        assert len(server.asked) == 7 and server.asked.count(blocks.input_ids[1].tolist()) == 2


def test_other_targets_and_another_model_are_refused(teacher, blocks, tokenizer, tmp_path):
    with TeacherServer(teacher, tokenizer) as server:
        write(server, blocks, tokenizer, tmp_path)
        with pytest.raises(UserError, match="another format, temperature or features"):
            write(server, blocks, tokenizer, tmp_path, k=3)
        with pytest.raises(UserError, match="another text or tokenizer"):
            write(server, blocks[:3], tokenizer, tmp_path)
        with pytest.raises(UserError, match="'other' is not served.*it serves teacher"):
            reach(server, model="other")
    with (
        TeacherServer(teacher, tokenizer, name="other") as server,
        pytest.raises(UserError, match="another teacher"),
    ):
        write(server, blocks, tokenizer, tmp_path)


class OtherTokenizer:
    """Ours, but for one token."""

    def __init__(self, tokenizer, at):
        self.tokenizer, self.at = tokenizer, at

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)

    def decode(self, ids):
        return "".join("?!" if i == self.at else self.tokenizer.decode([i]) for i in ids)


def test_another_tokenizer_is_refused_by_content(teacher, blocks, tokenizer, tmp_path):
    with (
        TeacherServer(teacher, OtherTokenizer(tokenizer, 1234)) as server,
        pytest.raises(UserError, match="id 1234 is '[?]!' to it"),
    ):
        write(server, blocks, tokenizer, tmp_path)
    assert not (tmp_path / "store.json").exists()


def test_a_tokenizer_that_cuts_otherwise_is_refused(teacher, blocks, tokenizer, tmp_path):
    def backwards(text, **options):
        return {"input_ids": tokenizer(text, **options)["input_ids"][::-1]}

    other = OtherTokenizer(tokenizer, -1)
    other.tokenizer = type("T", (), {"__call__": lambda self, t, **o: backwards(t, **o), "decode": tokenizer.decode})()
    with TeacherServer(teacher, other) as server, pytest.raises(UserError, match="another tokenizer"):
        write(server, blocks, tokenizer, tmp_path)


def test_targets_are_not_taken_with_another_vocabulary(teacher, blocks, tokenizer, tmp_path):
    with TeacherServer(teacher, tokenizer) as server:
        write(server, blocks, tokenizer, tmp_path / "store")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other").mkdir()
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(data))
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert len(open_targets(tmp_path / "store", blocks, tokenizer=tokenizer)) == 6
    with pytest.raises(UserError, match="another tokenizer .*id 300 is"):
        open_targets(tmp_path / "store", blocks, tokenizer=other)


def test_limits_of_the_server_are_said(teacher, blocks, tokenizer, tmp_path):
    with TeacherServer(teacher, tokenizer, longest=S, most=5) as server:
        with pytest.raises(UserError, match="--block 11 is too long.*give --block 10 or less"):
            write(server, blocks, tokenizer, tmp_path)
        server.longest = 64
        with pytest.raises(UserError, match="logprobs of 7.*start vLLM with --max-logprobs 7"):
            write(server, blocks, tokenizer, tmp_path)
        assert server.tries <= 2  # a refusal is not repeated


def test_ids_that_were_not_sent_are_noticed(teacher, blocks, tokenizer, tmp_path):
    """A server that puts a BOS before the prompt answers other positions."""
    with TeacherServer(teacher, tokenizer) as server:
        answer = server.vllm
        server.vllm = lambda index, ids, k: answer(index, [ids[-1], *ids[:-1]], k)
        with pytest.raises(UserError, match="read other tokens than were sent"):
            write(server, blocks, tokenizer, tmp_path)


def test_the_key_goes_along_and_no_redirect_is_followed(teacher, blocks, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    moved = broken(b"", 307, {"Location": "http://127.0.0.1:9/v1/completions"})
    with TeacherServer(teacher, tokenizer, fault=lambda *_: moved) as server:
        with pytest.raises(UserError, match="it redirects to") as error:
            write(server, blocks, tokenizer, tmp_path)
        assert set(server.keys) == {"Bearer secret"} and "secret" not in str(error.value)
    assert all("secret" not in path.read_text(errors="ignore") for path in Path(tmp_path).rglob("store.json"))


def test_an_answer_larger_than_what_was_asked_for_is_cut_off(teacher, blocks, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("moe2dense.distillation.targets.served.server.LARGEST_ANSWER", 2**20)
    with (
        TeacherServer(teacher, tokenizer, fault=lambda *_: broken(bytes(2**21))) as server,
        pytest.raises(UserError, match="more than 1 MB"),
    ):
        write(server, blocks, tokenizer, tmp_path)


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "http://me:word@127.0.0.1:1/v1"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError) as error:
        connect(url, 4)
    assert "word" not in str(error.value) or "password" in str(error.value)


def test_no_more_requests_a_second_than_asked():
    limit = RateLimit(50.0)
    start = time.monotonic()
    for _ in range(6):
        limit.wait()
    assert time.monotonic() - start >= 5 / 50


def test_a_server_of_no_kind(teacher, tokenizer):
    with TeacherServer(teacher, tokenizer) as server:
        server.get = lambda path: {"data": [{"id": "m"}]} if path == "/v1/models" else None
        with pytest.raises(UserError, match="no server that gives log-probabilities"):
            reach(server)
        assert reach(server, kind="vllm").protocol.name == "vllm"
