"""Tasks from local files: what counts as solved, for a writer whose answers are known, and who answers."""

import http.server
import json
import threading
from decimal import Decimal

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.evaluation.local_tasks import final_number, read_task, score_task
from moe2dense.evaluation.sandbox import Limits
from moe2dense.evaluation.tasks import check_tasks, score_tasks
from moe2dense.evaluation.writers import ModelWriter, reach_model
from moe2dense.modeling.load import load_model

CHECK = "def check(f):\n    assert f(2, 3) == 5\n    assert f(-1, 1) == 0"
PROGRAMS = [{"prompt": "def add(a, b):\n", "entry_point": "add", "test": CHECK, "task_id": str(i)} for i in range(4)]
PROBLEMS = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(10)]


class KnownWriter:
    """Answers with what it was given, in turn, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def write(self, prompts, new, stops):
        self.prompts += prompts
        return self.answers[: len(prompts)]


@pytest.fixture
def file(tmp_path):
    def write(records, name="task.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_programs_that_pass_their_tests_are_solved(file):
    right, wrong = "    return a + b\n", "    return a - b\n"
    endless, early = "    while True: pass\n", "    raise SystemExit(0)\n"
    task = read_task(file(PROGRAMS))
    score = score_task(task, KnownWriter([right, wrong, endless, early]), limits=Limits(seconds=1))
    assert task.metric == "pass@1" and score == {"value": 0.25, "stderr": pytest.approx(0.25)}
    assert score_task(task, KnownWriter([right]), limit=1) == {"value": 1.0, "stderr": None}


def test_word_problems_are_judged_by_their_last_number(file):
    task = read_task(file(PROBLEMS))
    writer = KnownWriter(["4", " It is 3 + 3 = 6.", "#### 8 and 9", "none", "12.0", "1,4", "16", "18"])
    score = score_task(task, writer)
    assert task.metric == "exact match, 2 shown" and score["value"] == 7 / 8
    assert len(writer.prompts) == 8
    assert writer.prompts[0] == (
        "Question: What is 0 and 0?\nAnswer: 0 + 0 = 0\n#### 0\n\nQuestion: What is 1 and 1?\nAnswer: 1 + 1 = 2\n#### 2\n\n"
        "Question: What is 2 and 2?\nAnswer:"
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.50 dollars", "1234.50"), ("a -3 b", "-3"), ("5 #### 7 then 8", "7"), ("", None), ("#### none", None)],
)
def test_the_number_of_an_answer(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "needs records that all have the fields prompt, entry_point, test or question, answer"),
        ([{"text": "x"}], "needs records that all have"),
        ([PROGRAMS[0], PROBLEMS[0]], "needs records that all have"),
        ([{"question": "x", "answer": "none"}], "record 1 has no number"),
        ([3], "line 1 is no JSON object"),
    ],
)
def test_files_that_are_no_tasks(file, records, message):
    with pytest.raises(UserError, match=message):
        check_tasks([file(records)])
    with pytest.raises(UserError, match="cannot be read"):
        check_tasks(["nowhere.jsonl"])


@pytest.fixture(scope="module")
def whole(tiny):
    return load_model(tiny, "the teacher").eval()


@pytest.fixture
def server(whole, tokenizer):
    """Serve greedy completions of the example teacher as vLLM does."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "teacher", "max_model_len": 200}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            with torch.no_grad():
                ids = whole.generate(
                    torch.tensor([body["prompt"]]), max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0
                )
            text = tokenizer.decode(ids[0, len(body["prompt"]) :], skip_special_tokens=True)
            self.answer({"choices": [{"index": 0, "text": text}]})

        def answer(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
        running.shutdown()


def test_a_server_and_the_model_itself_write_the_same(server, whole, tokenizer):
    url, asked = server
    served = reach_model(url, tokenizer)
    assert served.name == "teacher" and served.longest == 200
    prompts = ["The captain went", "It was a dark night, and " * 60, "x"]
    own = ModelWriter(whole, tokenizer).write(prompts, 6, ["\n"])
    assert served.write(prompts, 6, ["\n"]) == own
    assert max(len(body["prompt"]) for body in asked) == 194
    with pytest.raises(UserError, match="'other' is not served at .*; it serves teacher"):
        reach_model(url, tokenizer, "other")
    with pytest.raises(UserError, match="is the server up"):
        reach_model("http://127.0.0.1:9", tokenizer, tries=1)


def test_the_same_tasks_for_a_model_here_and_a_served_one(server, whole, tokenizer, file, monkeypatch):
    monkeypatch.setattr("moe2dense.evaluation.local_tasks._NEW", {k: 4 for k in (("question", "answer"),)})
    name = file(PROBLEMS, "sums.jsonl")
    scores = score_tasks({"here": whole, "served": reach_model(server[0], tokenizer)}, tokenizer, [name], limit=2)
    row = scores["sums"]["exact match, 2 shown"]
    assert row["here"] == row["served"]
