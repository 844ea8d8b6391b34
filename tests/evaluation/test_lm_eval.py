"""Tasks of lm-evaluation-harness: the prefill adapter gives transformers' own log-likelihoods, offline, for both models."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.errors import UserError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from moe2dense.__main__ import main
from moe2dense.evaluation.lm_eval_model import prefill_lm
from moe2dense.evaluation.lm_eval_tasks import read_tasks, run_tasks
from moe2dense.teacher.load import load_teacher
from tests.evaluation.choice_task import CHOICE

pytestmark = pytest.mark.slow

REST = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
"""


@pytest.fixture(scope="module")
def whole(tiny):
    """The example teacher as transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.fixture(scope="module")
def teacher(tiny):
    """The same, streamed within a small budget."""
    return load_teacher(tiny, memory="40MB")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three local task files over eight made-up records."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, words = (
        random.Random(0),
        ["the", "sea", "was", "calm", "and", "every", "captain", "slept", "while", "men", "sang", "of", "war"],
    )
    rows = [
        {
            "question": " ".join(rng.choices(words, k=rng.randint(3, 40))),
            "choices": [" " + w for w in rng.sample(words, 3)],
            "label": rng.randrange(3),
        }
        for _ in range(8)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    rolling = REST.format(task="tiny_rolling", kind="loglikelihood_rolling", text="", target="{{question}}", data=data)
    (folder / "rolling.yaml").write_text(rolling + "metric_list: [{metric: byte_perplexity}]\n")
    written = REST.format(task="tiny_written", kind="generate_until", text="{{question}}", target="the", data=data)
    options = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n'
    (folder / "written.yaml").write_text(written + options)
    return {p.stem: str(p) for p in folder.glob("*.yaml")} | {"rows": rows}


def request(*arguments):
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def own_loglikelihood(model, context, tokens):
    """Sum of log-probabilities of `tokens` after `context` ids, by one unpadded forward each."""
    with torch.no_grad():
        logp = model(torch.tensor([context + tokens])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(tokens) - 1)
    picked = [float(logp[i, t]) for i, t in zip(places, tokens, strict=True)]
    return sum(picked), all(int(logp[i].argmax()) == t for i, t in zip(places, tokens, strict=True))


def test_loglikelihoods_equal_transformers_own(teacher, whole, tokenizer, monkeypatch):
    pairs = [("The captain", " of the ship"), ("", "In the beginning"), ("It was a dark and stormy night; " * 9, "the rain fell"),
             ("She said ", "nothing"), ("A", " b")]  # fmt: skip
    lm = prefill_lm(teacher, tokenizer)
    monkeypatch.setattr("moe2dense.evaluation.lm_eval_model.LEAST_TOKENS", 8)  # several macro-batches
    lengths = [9, 3, 60, 4, 2]
    batches = list(lm._batches(lengths))
    assert sorted(i for b in batches for i in b) == [0, 1, 2, 3, 4] and len(batches) > 1
    scores = lm.loglikelihood([request(*p) for p in pairs])
    for (context, text), (logp, greedy) in zip(pairs, scores, strict=True):
        before = tokenizer(context)["input_ids"] if context else [lm.prefix_token_id]
        stripped = context.rstrip()
        ids = (
            tokenizer(context + text)["input_ids"]
            if context
            else before + tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        cut = len(tokenizer(stripped)["input_ids"]) if context else 1
        expected, first = own_loglikelihood(whole, ids[:cut], ids[cut:])
        assert logp == pytest.approx(expected, abs=1e-4) and greedy == first
    ids = tokenizer("once more")["input_ids"]
    likeliest = []
    with torch.no_grad():
        for _ in range(3):
            likeliest.append(int(whole(torch.tensor([ids + likeliest])).logits[0, -1].argmax()))
    assert lm._loglikelihood_tokens([(("", ""), ids, likeliest)])[0][1]


def test_long_texts_are_cut_as_the_harness_does(teacher, whole, tokenizer):
    from lm_eval.models.huggingface import HFLM

    text = " ".join(f"word{i} and" for i in range(150))
    ids = tokenizer(text)["input_ids"]
    lm = prefill_lm(teacher, tokenizer)
    lm.max_length = 60
    theirs = HFLM(pretrained=whole, tokenizer=tokenizer, max_length=60, batch_size=2, device="cpu")
    rolling = [request(text), request("short")]
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-5)
    pair = [request(text, " the end")]
    assert len(ids) > 100
    assert lm.loglikelihood(pair)[0][0] == pytest.approx(theirs.loglikelihood(pair)[0][0], abs=1e-4)
    assert lm.loglikelihood(pair)[0][1] == theirs.loglikelihood(pair)[0][1]


def test_local_tasks_run_offline_for_teacher_and_student_alike(teacher, whole, tokenizer, tasks):
    names = [tasks[k] for k in ("choice", "rolling", "written")]
    results = run_tasks({"teacher": teacher, "student": whole}, tokenizer, names, limit=6)
    assert set(results) == {"tiny_choice", "tiny_rolling", "tiny_written"}
    for metrics in results.values():
        for values in metrics.values():
            assert values["teacher"]["value"] == pytest.approx(values["student"]["value"], rel=1e-4)
    right = 0
    for row in tasks["rows"][:6]:
        scores = []
        for choice in row["choices"]:  # the harness puts a space before each choice, and keeps one that is there
            ids = tokenizer(row["question"] + " " + choice)["input_ids"]
            before = len(tokenizer(row["question"])["input_ids"])
            scores.append(own_loglikelihood(whole, ids[:before], ids[before:])[0])
        right += max(range(3), key=scores.__getitem__) == row["label"]
    assert results["tiny_choice"]["acc"]["teacher"]["value"] == pytest.approx(right / 6)
    total = sum(
        own_loglikelihood(whole, [tokenizer.bos_token_id], tokenizer(r["question"])["input_ids"])[0]
        for r in tasks["rows"][:6]
    )
    size = sum(len(r["question"].encode()) for r in tasks["rows"][:6])
    perplexity = results["tiny_rolling"]["byte_perplexity"]["teacher"]["value"]
    assert perplexity == pytest.approx(torch.tensor(-total / size).exp().item(), rel=1e-4)


def test_writing_stops_where_the_task_says(whole, tokenizer, monkeypatch):
    lm = prefill_lm(whole, tokenizer)
    options = {"until": ["stop", "."], "max_gen_toks": 4}
    monkeypatch.setattr(
        lm, "write_tokens", lambda prompts, new, sampling: [tokenizer(" a stop. b")["input_ids"]] * len(prompts)
    )
    assert lm.generate_until([request("x", options), request("y", {"until": []})]) == [" a ", " a stop. b"]


def test_task_names_and_files_that_do_not_work_are_one_sentence(tmp_path, tiny, text, tasks, capsys):
    (tmp_path / "none.yaml").write_text("dataset_path: json\n")
    (tmp_path / "bad.yaml").write_text("task: [\n")
    for name, message in (
        ("none.yaml", "names no task"),
        ("bad.yaml", "not valid YAML"),
        ("gone.yaml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_tasks([str(tmp_path / name)])
    arguments = ["eval", str(tiny), "--teacher", str(tiny), "--data", str(text)]
    assert main([*arguments, "--tasks", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert "--tasks" in error and error.count("\n") == 1


def test_without_the_extra_one_sentence_says_how_to_get_it(tiny, text, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["eval", str(tiny), "--teacher", str(tiny), "--data", str(text), "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'moe2dense[eval]'" in error and error.count("\n") == 1
