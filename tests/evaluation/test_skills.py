"""Skills: a planted oracle solves every task, a blind model guesses, likelihoods equal a plain forward pass."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.data.frequency import count_tokens
from moe2dense.evaluation.reference import Reference
from moe2dense.evaluation.skill_probes import CANDIDATES, SKILLS, Probe, fact_probes, text_probes, tokenised
from moe2dense.evaluation.skills import measure_skills, retention, share, solved
from moe2dense.modeling.head import Head

TEACHER = Path(__file__).parents[2] / "examples/tiny-mixtral"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


def llama(seed, vocabulary=53):
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=31
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.4, rope_theta=3e5, **sizes)).eval()


def random_probes(count, vocabulary=53):
    generator = torch.Generator().manual_seed(2)
    probes = []
    for i in range(count):
        prompt = torch.randint(0, vocabulary, (5 + i % 7,), generator=generator).tolist()
        tails = [
            torch.randint(0, vocabulary, (1 + (i + c) % 3,), generator=generator).tolist() for c in range(CANDIDATES)
        ]
        probes.append(Probe(SKILLS[i % 2].name, tuple((*prompt, *t) for t in tails), len(prompt)))
    return probes


def test_the_likeliest_candidate_is_that_of_a_plain_forward_pass():
    model, probes = llama(0), random_probes(30)
    wanted = []
    for probe in probes:
        totals = []
        for candidate in probe.candidates:
            with torch.no_grad():
                scores = model.double()(torch.tensor([candidate])).logits[0].log_softmax(-1)
            totals.append(sum(float(scores[i - 1, candidate[i]]) for i in range(probe.start, len(candidate))))
        wanted.append(totals.index(max(totals)) == 0)
    assert solved(model.float(), probes) == wanted and 0 < sum(wanted) < 30


def test_tasks_are_right_by_their_own_rules_and_the_same_for_a_seed():
    probes = text_probes(20, seed=3)
    assert probes == text_probes(20, seed=3) and probes != text_probes(20, seed=4)
    for probe in probes:
        assert len(set(probe.candidates)) == CANDIDATES
        right = probe.candidates[0].strip()
        match probe.skill:
            case "arithmetic":
                for line in f"{probe.prompt} {right}".splitlines():
                    a, plus, b, equals, c = line.split()
                    assert (plus, equals) == ("+", "=") and int(a) + int(b) == int(c)
            case "copying":
                first, second = (
                    part.split(",")
                    for part in probe.prompt.removeprefix("The words are: ").split(". Once more, the words are: ")
                )
                written = [w.strip() for w in second if w.strip()]
                assert [w.strip() for w in first][: len(written) + 1] == [*written, right]
            case "induction":
                pairs = dict(pair.split() for pair in probe.prompt.split(". ")[:-1])
                assert pairs[probe.prompt.split(". ")[-1]] == right
            case "brackets":
                text = (probe.prompt + probe.candidates[0]).replace(" ", "")
                closing = {")": "(", "]": "[", "}": "{", ">": "<"}
                stack = []
                for mark in text:
                    if mark not in closing:
                        stack.append(mark)
                    else:
                        assert stack.pop() == closing[mark]
            case "code":
                assert right.isidentifier()
    counts = {s.name: sum(p.skill == s.name for p in probes) for s in SKILLS if s.name != "facts"}
    assert set(counts.values()) == {20}, counts


def test_facts_are_what_stands_in_the_training_text(tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 4096, (30, 80), generator=generator)
    blocks = Blocks(ids, passages=torch.arange(15).repeat_interleave(2)[:, None].expand(30, 80))
    probes = fact_probes(blocks, count_tokens(blocks, 4096), tokenizer, 12)
    assert len(probes) == 12
    rows = [tuple(row) for row in ids.tolist()]
    owners = set()
    for probe in probes:
        right, prompt = probe.candidates[0], probe.candidates[0][:-1]
        place = [(r, i) for r, row in enumerate(rows) for i in range(80) if row[i : i + len(right)] == right]
        assert place and right[-1] not in prompt and all(c[:-1] == prompt for c in probe.candidates)
        assert not {c[-1] for c in probe.candidates} & set(prompt)
        owners.add(place[0][0] // 2)
    assert len(owners) == 12  # one a passage


def test_candidates_share_the_prompt_whatever_the_tokenizer_joins(tokenizer):
    for probe in tokenised(text_probes(5), tokenizer):
        assert len({c[: probe.start] for c in probe.candidates}) == 1
        assert len({tokenizer.decode(list(c[probe.start :])) for c in probe.candidates}) == CANDIDATES


def oracle(probes, vocabulary, wrong=()):
    """A model that gives the right candidate's next token all probability; the last one's for the probes in `wrong`."""
    wanted = {}
    for number, probe in enumerate(probes):
        right = probe.candidates[-1 if number in wrong else 0]
        for i in range(probe.start, len(right)):
            wanted[right[:i]] = right[i]

    class Oracle:
        pass

    def hidden_of(blocks):
        hidden = torch.zeros(*blocks.input_ids.shape, vocabulary)
        for r, row in enumerate(blocks.input_ids.tolist()):
            for i in range(len(row)):
                if tuple(row[: i + 1]) in wanted:
                    hidden[r, i, wanted[tuple(row[: i + 1])]] = 30.0
        return Reference(blocks, hidden, Head(torch.eye(vocabulary)))

    return hidden_of


def test_scores_and_retention_of_planted_models(monkeypatch):
    probes = [p for p in random_probes(60) if len({c[: p.start + 1] for c in p.candidates}) == CANDIDATES]
    arithmetic = [i for i, p in enumerate(probes) if p.skill == "arithmetic"]
    models = {
        "teacher": oracle(probes, 53),
        "student": oracle(probes, 53, wrong=arithmetic[: len(arithmetic) // 2]),
        "control": oracle(probes, 53, wrong=range(len(probes))),
    }
    monkeypatch.setattr("moe2dense.evaluation.skills.reference", lambda model, blocks: model(blocks))
    result = measure_skills(models.items(), probes)
    rows = {row["name"]: row for row in result["skills"]}
    assert list(rows) == ["arithmetic", "copying"] and rows["arithmetic"]["tasks"] == len(arithmetic)
    half = 1 - (len(arithmetic) // 2) / len(arithmetic)
    assert rows["arithmetic"]["scores"]["teacher"]["value"] == 1
    assert rows["arithmetic"]["scores"]["student"]["value"] == pytest.approx(half)
    assert rows["arithmetic"]["retention"]["student"] == pytest.approx((half - 0.25) / 0.75)
    assert rows["copying"]["retention"] == {"student": 1.0, "control": pytest.approx(-1 / 3)}
    assert measure_skills(models.items(), []) is None


def test_a_teacher_that_may_be_guessing_has_nothing_to_keep():
    guess = share(torch.arange(20) < 7)
    assert guess["low"] < 0.25 < guess["value"] < guess["high"]
    assert retention({"teacher": guess, "student": share(torch.ones(20, dtype=torch.bool))}) == {"student": None}
    # an exact interval: the chance of so many or more is 2.5% at its lower end
    from scipy import stats

    assert 1 - stats.binom.cdf(6, 20, guess["low"]) == pytest.approx(0.025, rel=1e-6)
