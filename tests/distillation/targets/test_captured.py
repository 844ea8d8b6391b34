"""Sets that DistillKit captured: read as its own reader reads them, told by content, trained on as our own top-k; and ours for it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.captured.bits import id_bits, pack, unpack, unpack_words
from moe2dense.distillation.targets.captured.log_probs import pack_log_p, unpack_log_p
from moe2dense.distillation.targets.captured.rows import is_captured, open_rows
from moe2dense.distillation.targets.captured.settings import Bin, Packing, default_packing, read_packing
from moe2dense.distillation.targets.captured.targets import captured_text, open_captured
from moe2dense.distillation.targets.captured.write import write_captured
from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.distillation.targets.open import open_any_targets
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import TopKRows
from moe2dense.modeling.head import Head

FIXTURES = Path(__file__).parent / "distillkit"
SETS = ["recommended", "budget", "steps", "bins", "exact", "older"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """datasets' cache is the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_as_distillkit_reads_it(name):
    """The likeliest ids exactly; values to the rounding of the dtype in which its own reader keeps them."""
    rows, expected = open_rows(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    assert len(rows) == 3
    for i in range(3):
        ids, values = rows.likeliest(i, len(rows.row(i).ids))
        assert torch.equal(ids, expected[f"ids-{i}"])
        coarse = {"bins": 2e-2, "recommended": 1e-3, "budget": 1e-3}.get(name, 1e-4)
        torch.testing.assert_close(values, expected[f"values-{i}"], rtol=coarse, atol=coarse)


@pytest.mark.parametrize(("name", "nats"), [("exact", 1e-6), ("recommended", 0.2), ("steps", 0.5), ("older", 0.3)])
def test_a_set_holds_the_teachers_distributions(name, nats):
    """To the error of the packing itself, which only the exact one has none of."""
    rows, expected = open_rows(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    for i in range(3):
        _, values = rows.likeliest(i, len(rows.row(i).ids))
        assert (values - expected[f"log_p-{i}"]).abs().mean() < nats


def test_rows_become_blocks(tokenizer):
    text = captured_text(FIXTURES / "exact", 100)
    blocks = text.blocks
    assert len(blocks) == 3 and text.dropped_tokens == 0 and blocks.document_ids is None
    lengths = blocks.attention_mask.sum(1).tolist()
    assert max(lengths) == blocks.input_ids.shape[1] and lengths == [
        len(open_rows(FIXTURES / "exact").row(i).ids) for i in range(3)
    ]
    assert "universally" in tokenizer.decode(blocks.input_ids[1])
    cut = captured_text(FIXTURES / "exact", 5)
    assert cut.blocks.input_ids.shape == (3, 5) and cut.dropped_tokens == sum(n - 5 for n in lengths)
    assert f"{cut.dropped_tokens} tokens beyond" in cut.sentence()
    assert len(captured_text(FIXTURES / "exact", 100, tokens=3).blocks) == 1


def test_rows_that_were_packed_together_keep_their_documents(tokenizer):
    apart, joined = captured_text(FIXTURES / "recommended", 100), captured_text(FIXTURES / "joined", 100)
    assert joined.blocks.document_ids is not None
    targets = open_captured(FIXTURES / "joined", joined.blocks, tokenizer)
    single = open_captured(FIXTURES / "recommended", apart.blocks, tokenizer)
    found = 0
    for i, (ids, documents) in enumerate(zip(joined.blocks.input_ids, joined.blocks.document_ids, strict=True)):
        rows = targets.batch([i])
        for document in range(1, int(documents.max()) + 1):
            part = documents == document
            for j, other in enumerate(apart.blocks.input_ids):
                count = int(part.sum())
                if torch.equal(other[:count], ids[part]):
                    assert torch.equal(single.batch([j]).ids[:count], rows.ids[part])
                    found += 1
                    break
    assert found >= 3


def test_training_reads_a_set_as_our_own_top_k(tokenizer):
    """The same loss and gradient as top-k rows of the teacher's own log-probabilities."""
    blocks = captured_text(FIXTURES / "exact", 100).blocks
    targets = open_any_targets(FIXTURES / "exact", blocks, tokenizer=tokenizer)
    expected = load_file(FIXTURES / "exact" / "expected.safetensors")
    mask = blocks.attention_mask[1]
    own = TopKRows(expected["ids-1"], expected["log_p-1"])
    generator = torch.Generator().manual_seed(1)
    head = Head(torch.randn(len(tokenizer), 12, generator=generator))
    hidden = torch.randn(int(mask.sum()), 12, generator=generator)
    results = []
    for rows in (targets.batch([1]).select(mask.nonzero()[:, 0]), own):
        states = hidden.clone().requires_grad_()
        loss = distillation_loss(states, head, rows).total
        results.append((loss.item(), torch.autograd.grad(loss, states)[0]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_a_set_is_told_by_what_it_is(tmp_path):
    assert (
        is_captured(FIXTURES / "exact")
        and is_captured(FIXTURES / "older")
        and is_captured(FIXTURES / "exact" / "data_0.parquet")
    )
    assert not is_captured(tmp_path) and not is_captured(tmp_path / "missing") and not is_captured(FIXTURES)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    assert not is_captured(tmp_path)


def copied(name, tmp_path, **settings):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    file = folder / "compression_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 15, "exact_k": 15}, "64 bytes a position where the settings say 60"),
        ({"exact_dtype": "int3"}, "does not say how"),
        ({"surprise": 1}, "unknown fields surprise"),
        ({"d": 40}, "token .* 40"),
        ({"residual_bins": [{"scale_dtype": "float32", "element_bits": 65, "num_elements": 1}]}, "does not say how"),
    ],
)
def test_settings_of_another_set_are_refused(settings, message, tmp_path, tokenizer):
    folder = copied("exact", tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        open_captured(folder, captured_text(folder, 100).blocks, tokenizer)


def test_settings_are_read_from_a_run_of_distillkit(tmp_path):
    own = read_packing(FIXTURES / "steps" / "compression_config.yaml")
    table = yaml.safe_load((FIXTURES / "steps" / "compression_config.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"teacher": {"kind": "dataset", "logprob_compressor": table}}))
    assert read_packing(tmp_path / "run.yaml") == own and len(own.residual_bins) == 2
    folder = copied("exact", tmp_path)
    (folder / "compression_config.yaml").unlink()
    with pytest.raises(UserError, match="has no compression_config.yaml"):
        open_rows(folder)


def test_another_vocabulary_is_refused_by_content(tmp_path, tokenizer):
    """With its tokenizer beside it token by token, without by whether the text comes back."""
    blocks = captured_text(FIXTURES / "exact", 100).blocks

    class Shifted(type(tokenizer)):
        def decode(self, ids, **options):
            return super().decode([(i + 500) % 4000 for i in ids], **options)

    other = Shifted.from_pretrained(tokenizer.name_or_path)
    with pytest.raises(UserError, match="of its tokens come back"):
        open_captured(FIXTURES / "exact", blocks, other)
    folder = copied("exact", tmp_path)
    tokenizer.save_pretrained(folder / "tokenizer")
    assert len(open_captured(folder, blocks, tokenizer)) == 3


def test_text_of_another_set_is_refused(tokenizer):
    with pytest.raises(UserError, match="lacks 2 of the 2 blocks"):
        open_captured(FIXTURES / "exact", Blocks(torch.randint(3, 90, (2, 9))), tokenizer)


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 17, 31])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_bits_come_back(bits, count):
    numbers = np.random.default_rng(bits * count).integers(0, 2**bits, (5, count))
    packed = pack(numbers, bits)
    assert packed.shape == (5, -(-bits * count // 8)) and np.array_equal(unpack(packed, bits, count), numbers)
    plain = [int("".join(f"{n:0{bits}b}" for n in row).ljust(packed.shape[1] * 8, "0"), 2) for row in numbers.tolist()]
    assert [int.from_bytes(row.tobytes(), "big") for row in packed] == plain
    each = 64 // bits
    words = np.zeros((5, -(-count // each)), np.uint64)
    for i in range(count):
        words[:, i // each] |= numbers[:, i].astype(np.uint64) << np.uint64(bits * (i % each))
    assert np.array_equal(unpack_words(words, bits, count), numbers)
    with pytest.raises(ValueError, match="hold no"):
        unpack(packed, bits, count + 8)


def test_ids_take_as_many_bits_as_distillkit_gives_them():
    assert [id_bits(d) for d in (2, 3, 4096, 4097, 32000, 128256, 151936)] == [1, 2, 12, 13, 15, 17, 18]


@pytest.mark.parametrize(
    ("packing", "nats"),
    [
        (Packing(500, 20, 20), 1e-6),
        (Packing(500, 20, 20, delta_encoding=True), 1e-5),
        (default_packing(500, 20), 1e-6),
        (default_packing(500, 60), 0.02),
        (Packing(500, 20, 3, (Bin("float32", 12, 17),)), 0.01),
        (
            Packing(
                500,
                20,
                3,
                (Bin("float16", 10, 9), Bin("float32", 8, 8)),
                "float32",
                (0, 1, "sqrt"),
                delta_encoding=False,
            ),
            0.02,
        ),
    ],
)
def test_log_probabilities_come_back_to_the_error_of_their_packing(packing, nats):
    log_p = (4 * torch.randn(30, 500)).log_softmax(-1).topk(packing.k).values
    packed = pack_log_p(log_p, packing)
    assert packed.shape == (30, packing.log_p_bytes)
    assert (unpack_log_p(packed, packing) - log_p).abs().max() < nats


def test_our_targets_are_written_and_read_again(tokenizer, tmp_path):
    generator = torch.Generator().manual_seed(2)
    head = Head(torch.randn(len(tokenizer), 8, generator=generator))
    ids = torch.tensor([tokenizer("The sea was calm. " * 5)["input_ids"][:18]] * 2)
    ids[1, 5:] = ids[0, :13]
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[1, 15:] = False
    documents = torch.tensor([[4] * 6 + [5] * 12, [7] * 18], dtype=torch.int32)
    blocks = Blocks(ids, attention_mask=mask, document_ids=documents)
    targets = HiddenTargets(torch.randn(2, 18, 8, generator=generator), head)
    write_captured(targets, blocks, tokenizer, tmp_path / "set", k=12)
    text = captured_text(tmp_path / "set", 18)
    assert torch.equal(text.blocks.input_ids[1, :15], ids[1, :15]) and text.blocks.tokens == 33
    assert text.blocks.document_ids[0].tolist() == [1] * 6 + [2] * 12
    rows = open_captured(tmp_path / "set", text.blocks).batch([0])
    top = (targets.hidden[0] @ head.weight.T).log_softmax(-1).topk(12)
    assert torch.equal(rows.ids, top.indices) and rows.tail
    assert (rows.log_p - top.values).abs().max() < 0.01
