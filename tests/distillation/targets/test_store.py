import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.modeling.head import model_head


def make_teacher(seed=0, vocabulary=67):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def make_blocks(n=7, s=9, seed=0):
    return Blocks(torch.randint(0, 67, (n, s), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


def student_loss(rows, **options):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(len(rows), 24, generator=g).requires_grad_()
    head = model_head(make_teacher(3))
    loss = distillation_loss(hidden, head, rows, **options)
    return loss.total.item(), torch.autograd.grad(loss.total, hidden)[0]


@pytest.mark.parametrize("format", ["hidden", "full"])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_exact_formats_equal_the_teacher(teacher, tmp_path, format, loss):
    blocks = make_blocks()
    memory, stored = (
        hidden_targets(teacher, blocks),
        open_targets(write_targets(teacher, blocks, tmp_path, format), blocks),
    )
    picked = [5, 0, 3]
    expected, stored_loss = (student_loss(t.batch(picked), loss=loss, temperature=2.0) for t in (memory, stored))
    assert stored_loss[0] == pytest.approx(expected[0], rel=5e-3)
    assert (stored_loss[1] - expected[1]).norm() < 1e-2 * expected[1].norm()


def test_top_k_keeps_the_likeliest(teacher, tmp_path):
    blocks = make_blocks()
    log_p = (teacher(blocks.input_ids[[4]]).logits / 1.5).log_softmax(-1)[0]
    rows = open_targets(write_targets(teacher, blocks, tmp_path, "topk", k=6, temperature=1.5), blocks).batch([4])
    top = log_p.topk(6)
    assert torch.equal(rows.ids, top.indices) and rows.temperature == 1.5 and rows.tail
    torch.testing.assert_close(rows.log_p, top.values, rtol=2e-3, atol=2e-3)


def test_samples_follow_the_distribution(teacher, tmp_path):
    blocks = make_blocks(2, 3)
    p = teacher(blocks.input_ids).logits.detach().softmax(-1).flatten(0, 1)
    total, draws = torch.zeros_like(p), 0
    for seed in range(40):
        store = open_targets(
            write_targets(teacher, blocks, tmp_path / str(seed), "sampled", draws=200, seed=seed), blocks
        )
        rows = store.batch([0, 1])
        assert torch.allclose(rows.weights.sum(-1), torch.ones(6))
        torch.testing.assert_close(rows.entropy, -(p * p.log()).sum(-1), rtol=2e-3, atol=2e-3)
        total.scatter_add_(1, rows.ids, rows.weights * 200)
        draws += 200
    expected = p * draws
    frequent = expected > 5
    chi2 = ((total - expected).square() / expected)[frequent].sum() / frequent.sum()
    assert 0.6 < chi2 < 1.5


def test_store_is_found_by_content(teacher, tmp_path):
    blocks = make_blocks()
    stored = open_targets(write_targets(teacher, blocks, tmp_path), blocks[[6, 2]])
    torch.testing.assert_close(stored.batch([0, 1]).hidden, open_targets(tmp_path, blocks).batch([6, 2]).hidden)
    assert stored.hidden.shape == (2, 9, 24) and len(stored) == 2
    for other in (make_blocks(seed=1), Blocks(blocks.input_ids.flatten().view(9, 7))):
        with pytest.raises(UserError, match="other text, another tokenizer"):
            open_targets(tmp_path, other)
    with pytest.raises(UserError, match="another teacher"):
        open_targets(tmp_path, blocks, teacher=make_teacher(8))
    assert len(open_targets(tmp_path, blocks, teacher=make_teacher())) == 7


def test_a_folder_of_other_files_is_left_alone(teacher, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"holds other files \(model.safetensors\); choose another folder"):
        write_targets(teacher, make_blocks(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"model.safetensors", ".lock"}


@pytest.mark.parametrize("format", TARGET_FORMATS)
def test_writing_goes_on_at_the_next_shard(teacher, tmp_path, monkeypatch, format):
    blocks = make_blocks(11)
    monkeypatch.setattr("moe2dense.distillation.targets.write._RESIDENT_BLOCKS", 4)
    whole = open_targets(write_targets(teacher, blocks, tmp_path / "whole", format), blocks)
    assert [s["to"] for s in whole.manifest["shards"]] == [4, 8, 11]

    def stop(stage, done, total, **numbers):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_targets(teacher, blocks, tmp_path / "part", format, progress=stop)
    with pytest.raises(UserError, match=r"unfinished \(8 of 11"):
        open_targets(tmp_path / "part", blocks)
    before = (tmp_path / "part/shard-0000004.safetensors").stat().st_mtime_ns
    calls = []
    monkeypatch.setattr(
        "moe2dense.distillation.targets.write.hidden_targets",
        lambda t, b, **k: calls.append(len(b)) or hidden_targets(t, b),
    )
    part = open_targets(write_targets(teacher, blocks, tmp_path / "part", format), blocks)
    assert calls == [3] and (tmp_path / "part/shard-0000004.safetensors").stat().st_mtime_ns == before
    for first in (0, 4, 8):
        name = f"shard-000000{first}.safetensors"
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert student_loss(part.batch([9, 1]))[0] == student_loss(whole.batch([9, 1]))[0]


def test_shards_are_small(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("moe2dense.distillation.targets.write.SHARD_BYTES", 2 * 24 * 9 * 3)
    stored = open_targets(write_targets(teacher, make_blocks(), tmp_path), make_blocks())
    assert [s["to"] for s in stored.manifest["shards"]] == [3, 6, 7]
    torch.testing.assert_close(
        stored.hidden.float(), hidden_targets(teacher, make_blocks()).hidden, rtol=1e-2, atol=1e-2
    )


def test_damage_is_noticed(teacher, tmp_path):
    blocks = make_blocks()
    write_targets(teacher, blocks, tmp_path)
    path = tmp_path / "shard-0000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_targets(tmp_path, blocks)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-0000000\.safetensors cannot be read"):
        open_targets(tmp_path, blocks)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json cannot be read"):
        open_targets(tmp_path, blocks)
    with pytest.raises(UserError, match="is no store"):
        open_targets(tmp_path / "nowhere", blocks)


def test_a_store_of_something_else_is_not_overwritten(teacher, tmp_path):
    write_targets(teacher, make_blocks(), tmp_path)
    with pytest.raises(UserError, match="another text or tokenizer"):
        write_targets(teacher, make_blocks(seed=2), tmp_path)
    with pytest.raises(UserError, match="another teacher"):
        write_targets(make_teacher(4), make_blocks(), tmp_path)
    with pytest.raises(UserError, match="another format"):
        write_targets(teacher, make_blocks(), tmp_path, "topk")
    before = json.loads((tmp_path / "store.json").read_text())
    write_targets(teacher, make_blocks(), tmp_path)
    assert json.loads((tmp_path / "store.json").read_text()) == before
    with pytest.raises(UserError, match="format must be one of"):
        write_targets(teacher, make_blocks(), tmp_path, "logits")
    with pytest.raises(UserError, match="draws"):
        write_targets(teacher, make_blocks(), tmp_path, "sampled", draws=300)


@pytest.mark.parametrize("format", TARGET_FORMATS)
def test_a_store_trains_without_the_teacher(teacher, tmp_path, format):
    from transformers import MistralConfig, MistralForCausalLM

    from moe2dense.config.training import TrainConfig
    from moe2dense.distillation.api import distill

    torch.manual_seed(3)
    student = MistralForCausalLM(
        MistralConfig(
            vocab_size=67,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
    blocks = make_blocks(16)
    store = open_targets(write_targets(teacher, blocks, tmp_path, format), blocks)
    config = TrainConfig(batch=36, lr=1e-2, epochs=20.0)
    result = distill(
        student, data=blocks, targets=store, valid=blocks, valid_targets=hidden_targets(teacher, blocks), config=config
    )
    kls = [r["valid_kl"] for r in result.history if "valid_kl" in r]
    assert kls[-1] < 0.5 * kls[0]
