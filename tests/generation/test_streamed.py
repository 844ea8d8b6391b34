"""Text written by a teacher against transformers' generate, and draws that belong to a sequence."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.common.seeds import uniforms
from moe2dense.errors import UserError
from moe2dense.generation.sampling import Sampling, choose, nucleus
from moe2dense.generation.streamed import generate
from moe2dense.teacher.load import load_teacher

NEW = 9


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(tiny, memory="300MB", experts="streamed")


@pytest.fixture(scope="module")
def model(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = [
        "The king",
        "In the year of our Lord",
        "She",
        "A molecule of water is",
        "He said that they would never again",
    ]
    return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]


def by_transformers(model, prompts, **options):
    """transformers' generate on left-padded prompts; what follows each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=2, **options)
    return out[:, longest:].tolist()


def test_greedy_is_transformers_greedy(teacher, model, prompts):
    expected = by_transformers(model, prompts, do_sample=False)
    completions = generate(teacher, prompts, NEW, [2], Sampling(temperature=0))
    for answer, wanted in zip(completions, expected, strict=True):
        end = wanted.index(2) if 2 in wanted else NEW
        assert answer.ids == wanted[:end]
        assert answer.stopped == (2 in wanted)


def test_nll_is_the_teachers(teacher, model, prompts):
    for prompt, answer in zip(prompts, generate(teacher, prompts, NEW, [2], Sampling(seed=3)), strict=True):
        written = [*answer.ids, 2] if answer.stopped else answer.ids
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = -logits.gather(1, torch.tensor(written)[:, None]).mean()
        assert answer.nll == pytest.approx(float(wanted), abs=1e-4)


def test_beams_are_transformers_beams(teacher, model, prompts):
    expected = by_transformers(model, prompts, num_beams=3, do_sample=False, min_new_tokens=NEW)
    completions = generate(teacher, prompts, NEW, [], Sampling(temperature=0, beams=3))
    greedy = generate(teacher, prompts, NEW, [], Sampling(temperature=0))
    assert [a.ids for a in completions if 2 not in a.ids] == [
        w for a, w in zip(completions, expected, strict=True) if 2 not in a.ids
    ]
    assert all(b.nll <= g.nll + 1e-5 for b, g in zip(completions, greedy, strict=True))
    assert any(b.ids != g.ids for b, g in zip(completions, greedy, strict=True))


def test_beams_end_where_the_teacher_ends(teacher, prompts):
    common = generate(teacher, prompts[:1], NEW, [], Sampling(temperature=0, beams=2))[0].ids[3]
    completion = generate(teacher, prompts[:1], NEW, [common], Sampling(temperature=0, beams=2))[0]
    assert common not in completion.ids


def test_draws_depend_on_seed_and_number_alone(tiny, teacher, prompts, monkeypatch):
    import moe2dense.generation.streamed as sequences

    many = prompts * 3
    whole = generate(teacher, many, NEW, [2], Sampling(seed=5))
    again = generate(teacher, many[4:], NEW, [2], Sampling(seed=5), first=4)
    assert [a.ids for a in whole[4:]] == [a.ids for a in again]
    monkeypatch.setattr(sequences, "sequences_that_fit", lambda *_: 4)
    assert [a.ids for a in generate(teacher, many, NEW, [2], Sampling(seed=5))] == [a.ids for a in whole]
    assert [a.ids for a in generate(teacher, many, NEW, [2], Sampling(seed=6))] != [a.ids for a in whole]
    assert whole[0].ids != whole[5].ids  # one prompt, two draws


def test_choices_follow_the_distribution():
    logits, draws = torch.randn(7, generator=torch.Generator().manual_seed(0)) * 2, 40_000
    u = torch.from_numpy(uniforms(1, 2, draws))
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.7)):
        wanted = nucleus((logits.double() / sampling.temperature).softmax(-1)[None], sampling.top_p)[0]
        wanted = wanted / wanted.sum()
        counts = torch.bincount(choose(logits.expand(draws, -1), sampling, u), minlength=7)
        possible = wanted > 0
        assert int(counts[~possible].sum()) == 0
        chi = float(((counts - draws * wanted)[possible] ** 2 / (draws * wanted)[possible]).sum())
        assert chi < 22.5  # 6 degrees of freedom at 0.1%


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    assert torch.equal(nucleus(p, 0.6) > 0, torch.tensor([[False, True, False, True], [True, False, False, False]]))
    assert torch.equal(
        choose(torch.log(p), Sampling(top_p=0.6), torch.tensor([0.9999999, 0.9999999])), torch.tensor([3, 0])
    )
    assert np.allclose(uniforms(0, 3, 5), uniforms(0, 3, 9)[:5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: generate(t, [[]], 3, []), "has no tokens"),
        (lambda t: generate(t, [[5] * 250], 30, []), "exceed the teacher's 256 positions"),
        (lambda t: Sampling(temperature=-1), "temperature must not be negative"),
        (lambda t: Sampling(top_p=0), "top_p must lie in"),
        (lambda t: Sampling(beams=4), "draws nothing"),
    ],
)
def test_bad_input(teacher, call, message):
    with pytest.raises(UserError, match=message):
        call(teacher)
