"""Teachers with another tokenizer: the losses in float64 against autograd, positions by brute force, and what users are told."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe2dense.__main__ import main
from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.distillation.targets.cross_tokenizer import (
    CrossRows,
    common_boundaries,
    cross_targets,
    shared_tokens,
    uld,
)
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.teacher.load import load_teacher


@pytest.fixture(scope="module")
def other(text):
    """A byte-level BPE of 500 tokens, trained on the example text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [json.loads(line)["text"] for line in (text / "train.jsonl").read_text().splitlines()[:40]]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_boundaries_are_those_of_brute_force():
    a, b = [1, 3, 3, 6, 10, 12], [2, 3, 4, 6, 6, 12]
    boundaries = common_boundaries(a, b)
    assert boundaries == [(1, 1), (3, 3), (5, 5)]
    assert all(a[i] == b[j] for i, j in boundaries)


def test_uld_is_its_definition_in_float64():
    torch.manual_seed(0)
    for wide, narrow in ((7, 11), (11, 7), (9, 9)):
        p = torch.randn(5, wide, dtype=torch.float64).softmax(-1)
        z = torch.randn(5, narrow, dtype=torch.float64, requires_grad=True)
        q = z.softmax(-1).sort(-1, descending=True).values
        size = max(wide, narrow)
        a = torch.nn.functional.pad(p.sort(-1, descending=True).values, (0, size - wide))
        wanted = (torch.nn.functional.pad(q, (0, size - narrow)) - a).abs().sum(-1)
        (grad,) = torch.autograd.grad(wanted.sum(), z)
        value, gradient = uld(p, z.detach().log_softmax(-1))
        torch.testing.assert_close(value, wanted.detach())
        torch.testing.assert_close(gradient, grad)


class Head:
    def __init__(self, weight):
        self.weight = weight

    def logits(self, hidden):
        return hidden @ self.weight.T


@pytest.mark.parametrize("form", ["uld", "aligned"])
def test_the_objective_in_float64(form):
    torch.manual_seed(1)
    n, h, w, v, temperature = 6, 4, 9, 13, 1.5
    head = Head(torch.randn(w, h, dtype=torch.float64))
    hidden, known = torch.randn(n, h, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    student_ids, teacher_ids = torch.tensor([0, 2, 5, 12]), torch.tensor([3, 1, 0, 8])
    rows = CrossRows(hidden, known, head, form, (student_ids, teacher_ids), n / 4)
    z = torch.randn(n, v, dtype=torch.float64, requires_grad=True)
    got = distillation_loss(z, None, rows, temperature=temperature, tile_bytes=2 * v * 8)
    (grad,) = torch.autograd.grad(got.total, z)
    x = z.detach().clone().requires_grad_()
    p, q = (hidden @ head.weight.T / temperature).softmax(-1), (x / temperature).softmax(-1)
    if form == "uld":
        each = torch.stack([abs_sorted(p[i], q[i]) for i in range(n)])
    else:
        p_k, q_k = p[:, teacher_ids], q[:, student_ids]
        p_all = torch.cat([p_k, 1 - p_k.sum(-1, keepdim=True)], 1)
        q_all = torch.cat([q_k, 1 - q_k.sum(-1, keepdim=True)], 1)
        each = (p_all * (p_all / q_all).log()).sum(-1)
    wanted = temperature**2 * each[known].mean()
    torch.testing.assert_close(got.total.double(), wanted.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, x)[0])


def abs_sorted(p, q):
    size = max(len(p), len(q))
    a, b = (torch.nn.functional.pad(x.sort(descending=True).values, (0, size - len(x))) for x in (p, q))
    return (a - b).abs().sum()


def test_one_tokenizer_is_the_ordinary_loss(tiny, text, tokenizer):
    teacher = load_teacher(tiny, memory="300MB")
    blocks, targets = cross_targets(teacher, tokenizer, str(text), 48, 300, "aligned", 0)
    assert targets.share == 1.0
    hidden = teacher.run(blocks.input_ids, blocks.attention_mask.long(), logits=False).hidden_states
    rows = targets.batch(range(len(blocks)))
    mask = blocks.attention_mask.flatten()
    torch.testing.assert_close(rows.hidden[mask], hidden.flatten(0, 1)[mask], rtol=1e-4, atol=1e-4)
    student = torch.randn(int(mask.sum()), 4096)
    counted = mask.nonzero()[:, 0]
    loss = distillation_loss(student, None, rows.select(counted)).kd
    log_p = teacher.head.logits(hidden.flatten(0, 1)[counted]).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)


def test_two_tokenizers_meet(tiny, text, tokenizer, other):
    teacher = load_teacher(tiny, memory="300MB")
    _blocks, targets = cross_targets(teacher, other, str(text), 64, 400, "uld", 0)
    assert 0.3 < targets.share < 1
    row = targets.place[0]
    at = [i for i in range(len(row)) if row[i] >= 0]
    assert all(int(row[a]) < int(row[b]) for a, b in itertools.pairwise(at))
    student_ids, teacher_ids = shared_tokens(other, tokenizer)
    assert len(student_ids) > 100 and (int(student_ids[-1]), int(teacher_ids[-1])) == (
        other.eos_token_id,
        tokenizer.eos_token_id,
    )


class Words:
    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return {w: i for i, w in enumerate(self.words)}


def test_vocabularies_are_compared_by_contents():
    words = [f"w{i}" for i in range(200)]
    assert compare_vocabularies(Words(words), Words(words)).same
    padded = compare_vocabularies(Words(words), Words([*words, "<extra>"]))
    assert padded.same and padded.shared == 200
    swapped = compare_vocabularies(Words(words), Words([*words[:17], "other", *words[18:]]))
    assert not swapped.same and "as many tokens, but id 17 is 'w17' for the teacher and 'other'" in swapped.difference
    assert "200 tokens and the student's 100" in compare_vocabularies(Words(words), Words(words[:100])).difference


def test_a_vocabulary_of_the_same_size_with_other_contents_is_another(tiny, text, tmp_path, monkeypatch, capsys):
    """Two tokens exchanged: the teacher's logits are not used, and the user is told which id differs."""
    import moe2dense.cli.actions.distill_sources as sources

    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        if (tiny / name).exists():
            (tmp_path / name).write_bytes((tiny / name).read_bytes())
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    words = contents["model"]["vocab"]
    a, b = list(words)[300:302]
    words[a], words[b] = words[b], words[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    dense.save_pretrained(tmp_path)

    def stop(setting, teacher, train, difference):
        raise UserError(difference)

    monkeypatch.setattr(sources, "_across_tokenizers", stop)
    call = ["distill", str(tmp_path), "--teacher", str(tiny), "--data", str(text), "--out", str(tmp_path / "o")]
    assert main([*call, "--tokens", "1500", "--block", "64", "--memory", "300MB"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    first = min(words[a], words[b])
    assert f"the vocabularies have as many tokens, but id {first} is" in said


@pytest.mark.parametrize("mode", ["text", "uld", "aligned"])
def test_distill_says_that_tokenizers_differ(mode, tiny, text, other, tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(other), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "student"
    LlamaForCausalLM(config).save_pretrained(folder)
    other.save_pretrained(folder)
    call = [
        "distill",
        str(folder),
        "--teacher",
        str(tiny),
        "--data",
        str(text),
        "--out",
        str(tmp_path / "o"),
        "--tokens",
        "1500",
    ]
    assert main([*call, "--block", "64", "--memory", "300MB", "--cross-tokenizer", mode]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the teacher's tokenizer is not the student's" in shown
    assert ("hard labels (alpha 1)" in shown) == (mode == "text")
    assert (tmp_path / "o" / "model" / "config.json").is_file()
