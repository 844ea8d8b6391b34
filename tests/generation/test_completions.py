"""A teacher of which only answers are known: files, and a server that stalls, lies, and breaks off."""

import http.server
import json
import threading
import time

import pytest

from moe2dense.__main__ import main
from moe2dense.config.schema import WriteConfig
from moe2dense.errors import UserError
from moe2dense.evaluation.likelihood import answer_nll
from moe2dense.generation.completions import answer_blocks, ask_endpoint, read_completions
from moe2dense.generation.endpoint import Endpoint, collect
from moe2dense.generation.prompts import Prompt

PROMPTS = [Prompt([5, 6], f"Question {i}:", "talk") for i in range(10)]


class Server:
    """An OpenAI-compatible server; `behave(n, body)` decides what the n-th request gets."""

    def __init__(self, behave):
        self.requests, lock = [], threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body, self.headers.get("Authorization")))
                behave(self, number, body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def send(handler, data: bytes, status=200, length=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def answer(handler, body, text=None):
    text = text if text is not None else " an answer to " + (body.get("prompt") or body["messages"][-1]["content"])
    choice = {"message": {"content": text}} if "messages" in body else {"text": text}
    send(handler, json.dumps({"choices": [choice]}).encode())


def endpoint(server, **options):
    return Endpoint(server.url, "m", **{"wait": 0.01, "timeout": 0.4, "tries": 3, "parallel": 2} | options)


def test_answers_come_in_the_order_of_the_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with Server(lambda h, n, b: answer(h, b)) as server:
        answers = collect(endpoint(server, max_tokens=7), PROMPTS, tmp_path, "p")
        assert [r["completion"] for r in answers] == [f" an answer to Question {i}:" for i in range(10)]
        assert answers[0]["domain"] == "talk"
        path, body, key = server.requests[0]
        assert (path, body["model"], body["max_tokens"], key) == ("/v1/completions", "m", 7, "Bearer k")
        talk = [Prompt([5], "x", messages=[{"role": "user", "content": "Hello?"}])]
        answers = collect(endpoint(server), talk, tmp_path / "chat", "p")
        assert answers[0]["messages"][-1] == {"role": "assistant", "content": " an answer to Hello?"}
        assert server.requests[-1][0] == "/v1/chat/completions"
        whole = Endpoint(server.url + "/chat/completions", "m")
        assert "messages" not in collect(whole, PROMPTS[:1], tmp_path / "forced", "p")[0]


def stall(handler, body):
    time.sleep(1.0)


def drip(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(10):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def broken(data, status=200, length=None):
    return lambda handler, body: send(handler, data, status, length)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stall, "no whole answer within 0.4 s"),
        (drip, "no whole answer within 0.4 s"),
        (broken(b"<html>busy</html>"), "no completion: '<html>busy"),
        (broken(b'{"choices": [{"te'), "no completion: '{\"choices"),
        (broken(b'{"choices": [{"te', length=80), "half an answer"),
        (broken(b'{"choices": [{"text": null}]}'), "an answer without text"),
        (broken(b'{"choices": []}'), 'no completion: \'{"choices": []}'),
        (broken(b"[1, 2]"), "no completion: '[1, 2]"),
        (broken(b"\xff\xfe\x00junk"), "no completion"),
        (broken(b""), "no completion: ''"),
        (broken(b"overloaded", 500), "HTTP 500: overloaded"),
    ],
    ids=["stall", "drip", "junk", "half json", "half body", "null", "none", "list", "bytes", "empty", "500"],
)
def test_what_goes_wrong_is_one_sentence_and_nothing_is_lost(fault, message, tmp_path):
    ill = True

    def behave(handler, number, body):
        if ill and body["prompt"] == "Question 5:":
            fault(handler, body)
        else:
            answer(handler, body)

    with Server(behave) as server:
        with pytest.raises(UserError) as caught:
            collect(endpoint(server), PROMPTS, tmp_path, "p")
        text = str(caught.value)
        assert message in text and "3 times" in text and "\n" not in text and "--resume" in text
        stored = len((tmp_path / "answers.jsonl").read_text().splitlines())
        assert stored >= 4 and f"{stored} answers are kept" in text
        ill, before = False, len(server.requests)
        assert len(collect(endpoint(server), PROMPTS, tmp_path, "p")) == 10
        assert len(server.requests) - before == 10 - stored  # asked for only once


def test_a_fault_that_passes_is_tried_again(tmp_path):
    with Server(lambda h, n, b: send(h, b"busy", 503) if n % 2 == 0 else answer(h, b)) as server:
        assert len(collect(endpoint(server, parallel=1), PROMPTS[:3], tmp_path, "p")) == 3
        assert len(server.requests) == 6


def test_refusals_are_not_repeated(tmp_path):
    with Server(lambda h, n, b: send(h, b'{"error": "no such model"}', 404)) as server:
        with pytest.raises(UserError, match="failed .HTTP 404: .*no such model.*0 answers are kept"):
            collect(endpoint(server, parallel=1), PROMPTS[:1], tmp_path, "p")
        assert len(server.requests) == 1
    with pytest.raises(UserError, match="the connection failed"):
        collect(Endpoint(server.url, "m", tries=1), PROMPTS[:1], tmp_path, "p")


def test_a_line_cut_short_is_asked_for_again(tmp_path):
    with Server(lambda h, n, b: answer(h, b)) as server:
        collect(endpoint(server, parallel=1), PROMPTS[:4], tmp_path, "p")
        file = tmp_path / "answers.jsonl"
        file.write_bytes(file.read_bytes()[:-9])
        assert len(collect(endpoint(server), PROMPTS[:4], tmp_path, "p")) == 4
        assert len(server.requests) == 5
        with pytest.raises(UserError, match="another model or to other prompts"):
            collect(Endpoint(server.url, "other"), PROMPTS[:4], tmp_path, "p")


def test_a_damaged_line_loses_no_other(tmp_path):
    with Server(lambda h, n, b: answer(h, b)) as server:
        collect(endpoint(server, parallel=1), PROMPTS[:4], tmp_path, "p")
        file = tmp_path / "answers.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], lines[1][: len(lines[1]) // 2], '{"number": "x"}', *lines[2:]]) + "\n")
        answers = collect(endpoint(server), PROMPTS[:4], tmp_path, "p")
        assert [r["completion"] for r in answers] == [f" an answer to Question {i}:" for i in range(4)]
        assert len(server.requests) == 5
        (tmp_path / "endpoint.json").write_text("{")
        with pytest.raises(UserError, match="endpoint.json cannot be read"):
            collect(endpoint(server), PROMPTS[:4], tmp_path, "p")


def test_half_a_character_is_kept_as_a_question_mark(tmp_path):
    """As servers send that cut a text after a number of tokens."""
    with Server(lambda h, n, b: send(h, b'{"choices": [{"text": " so \\ud83d"}]}')) as server:
        answers = collect(endpoint(server), PROMPTS[:2], tmp_path, "p")
        assert [r["completion"] for r in answers] == [" so ?"] * 2
        assert collect(endpoint(server), PROMPTS[:2], tmp_path, "p") == answers and len(server.requests) == 2


def test_only_empty_answers(tmp_path):
    with (
        Server(lambda h, n, b: answer(h, b, "")) as server,
        pytest.raises(UserError, match="all 10 answers of 'm' are empty"),
    ):
        collect(endpoint(server), PROMPTS, tmp_path, "p")


def test_as_many_answers_as_tokens(text, tokenizer, tmp_path):
    with Server(lambda h, n, b: answer(h, b, " word" * 20)) as server:
        write = WriteConfig(prompt_tokens=10)
        records = ask_endpoint(endpoint(server, max_tokens=20), str(text), tmp_path, write, tokenizer, 600, 0)
        sizes = [len(tokenizer(r["prompt"] + r["completion"])["input_ids"]) for r in records]
        assert 600 <= sum(sizes) + len(sizes) < 1400


def test_completions_files(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(
        '{"prompt": "a", "completion": " b"}\n{"messages": [{"role": "assistant", "content": "c"}]}\n{"prompt": "d", "comp'
    )
    records, warning = read_completions(file)
    assert len(records) == 2 and "line 3 is cut short" in warning
    for content, message in (
        ('{"prompt": "a"}\n', "line 1 has neither"),
        ('{"prompt": "a", "completion": "b"}\njunk\n', "line 2 is not JSON"),
        ("\n", "holds no completion"),
        ('{"messages": [{"role": "user", "content": "c"}]}\n', "line 1 has neither"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_completions(file)


def test_loss_is_on_the_answers(tokenizer, tmp_path):
    records = [
        {"prompt": "The king of France said to ", "completion": f"his {n} old friends that they should go"}
        for n in range(80)
    ]
    train, held_out = answer_blocks(records, tokenizer, 32, None, 0)
    assert held_out is not None and train.labels_mask is not None
    learnt = tokenizer.decode(train.input_ids[0][train.labels_mask[0]])
    assert "friends" in learnt and "France" not in learnt


@pytest.fixture
def student(tiny, tmp_path):
    """A small dense checkpoint with the teacher's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, eos_token_id=2, bos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "student"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def test_distill_from_completions(student, tmp_path, capsys):
    from moe2dense.student.open import open_student

    file = tmp_path / "c.jsonl"
    rows = [
        {"prompt": f"Question {n}: ", "completion": "the king went to the old castle by the sea"} for n in range(400)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    call = [
        "distill",
        str(student),
        "--completions",
        str(file),
        "--out",
        str(tmp_path / "o"),
        "--block",
        "64",
        "--lr",
        "0.01",
    ]
    assert main([*call, "--epochs", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "400 completions, learnt as hard labels" in shown and "nats per token before training" in shown
    from transformers import AutoTokenizer

    _, held_out = answer_blocks(rows, AutoTokenizer.from_pretrained(student), 64, None, 0)
    assert held_out is not None
    before, after = (answer_nll(open_student(str(p)).model, held_out) for p in (student, tmp_path / "o" / "model"))
    assert after < before - 1


def test_distill_from_an_endpoint(student, text, tmp_path, capsys):
    with Server(lambda h, n, b: answer(h, b, " the king went to the old castle by the sea")) as server:
        call = ["distill", str(student), "--endpoint", server.url, "--endpoint-model", "m", "--data", str(text)]
        assert main([*call, "--tokens", "2k", "--block", "64", "--out", str(tmp_path / "o")]) == 0
        assert "answers of 'm'" in capsys.readouterr().out
        asked = len(server.requests)
    assert asked and (tmp_path / "o" / "answers" / "answers.jsonl").is_file()
    assert main([*call, "--out", str(tmp_path / "p"), "--targets", "x"]) == 2
    assert (
        main(["distill", str(student), "--endpoint", "nowhere", "--data", str(text), "--out", str(tmp_path / "q")]) == 2
    )
    assert "must be an http(s) URL" in capsys.readouterr().err
