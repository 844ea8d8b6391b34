"""Attention through tiles gives what dense masks give, and what each document gives alone: values and gradients."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host, teacher_cards
from moe2dense.modeling import attention
from moe2dense.modeling.attention import attention_setting, eager_attention, flex_fault, use_attention
from moe2dense.modeling.block_masks import attend_by_rows, make_block_mask, mask_nbytes
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.student.target.dense_config import dense_config
from tests.teacher.families import FAMILIES, tiny_sizes

CPU = torch.device("cpu")
LENGTH = 150  # two tiles, the second not full; windows and chunks of the tiny families are 7 to 16 tokens long
DOCUMENTS = ((7, 100, 4, 39), (150,), (1, 128, 21))


def model_of(family, dense):
    config = AutoConfig.for_model(family, **tiny_sizes(family, max_position_embeddings=256))
    if dense:
        config = dense_config(config, student_host(teacher_cards()[family].host), 13)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.3)
    return model


def packed(padding=0):
    ids = torch.randint(3, 101, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in DOCUMENTS])
    real = torch.ones_like(ids)
    if padding:
        real[0, -padding:] = 0
    return ids, documents, real


def values_and_gradients(model, setting, inputs, real):
    """Final hidden states of real tokens, and the gradients of a sum of them, weighted at random."""
    model.zero_grad()
    with attention_setting(setting):
        hidden = final_hidden(model, inputs)[real.bool()]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).mean().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want):
    """Each within a thousandth of its largest number; those that are nothing but rounding beside the largest of all are left out."""
    largest = max(float(g.abs().max()) for g in want.values())
    assert got.keys() == want.keys() and largest > 0
    for name, gradient in want.items():
        scale = max(float(gradient.abs().max()), 1e-4 * largest)
        torch.testing.assert_close(got[name] / scale, gradient / scale, rtol=1e-3, atol=3e-4, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tiles_give_what_dense_masks_give(family):
    model = model_of(family, dense=False)
    if fault := flex_fault(model, CPU):
        with pytest.raises(UserError, match="--attention flex: .* use --attention auto"), attention_setting("flex"):
            use_attention(model, CPU)
        assert "no flex attention" in fault or "dropout" in fault
        return
    packs = teacher_cards()[family].packing
    ids, documents, real = packed(padding=11)
    inputs = model_inputs(Blocks(ids, attention_mask=real, document_ids=documents if packs else None))
    dense_masks = values_and_gradients(model, "sdpa", inputs, real)
    tiles = values_and_gradients(model, "flex", inputs, real)
    torch.testing.assert_close(tiles[0], dense_masks[0], rtol=1e-4, atol=3e-5)
    assert_same_gradients(tiles[1], dense_masks[1])


HOSTS = {student_host(teacher_cards()[family].host).name: family for family in sorted(FAMILIES)}


@pytest.mark.parametrize("family", sorted(HOSTS.values()))
def test_tiles_give_what_each_document_gives_alone(family):
    model = model_of(family, dense=True)
    if flex_fault(model, CPU) or not teacher_cards()[family].packing:
        pytest.skip("no tiles, or one document a block")
    ids, documents, real = (x[::2] for x in packed())
    hidden, gradients = values_and_gradients(model, "flex", model_inputs(Blocks(ids, document_ids=documents)), real)
    model.zero_grad()
    alone = []
    for row, lengths in zip(ids, DOCUMENTS[::2], strict=True):
        for part in row.split(list(lengths)):
            with attention_setting("sdpa"):
                alone.append(final_hidden(model, {"input_ids": part[None]})[0])
    want = torch.cat(alone)
    torch.testing.assert_close(hidden, want.detach(), rtol=1e-4, atol=3e-5)
    (want * torch.randn(want.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    assert_same_gradients(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def random_heads(length=150, width=8, value_width=6, dtype=torch.float64):
    torch.manual_seed(4)
    shapes = ((2, 6, length, width), (2, 3, length, width), (2, 3, length, value_width))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def windowed(length=150):
    """A rule for two blocks of packed documents, each seen in a window of 40 tokens, with padding in the second; and as a dense mask."""
    cut = torch.tensor([[13, 90, 47], [100, 1, 49]])
    documents = torch.stack([torch.arange(3).repeat_interleave(c) for c in cut])
    documents[1, -9:] = 7  # padding, of which no token is seen

    def rule(block, _head, query, key):
        same = documents[block, query] == documents[block, key]
        return same & (key <= query) & (key > query - 40) & (documents[block, key] != 7)

    n, q, k = torch.arange(2), torch.arange(length), torch.arange(length)
    return rule, rule(n[:, None, None, None], 0, q[:, None], k)


@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (2.0, None), (None, torch.randn(6).double())])
def test_attending_by_rows_is_the_softmax_of_what_is_seen(softcap, sinks):
    query, key, value = random_heads()
    rule, dense = windowed()
    mask = make_block_mask(rule, 2, 150, CPU)
    got = attend_by_rows(query, key, value, mask, 0.3, softcap, sinks)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = torch.where(dense, scores.exp(), 0.0)
    total = weights.sum(3, keepdim=True) + (0.0 if sinks is None else sinks.exp()[:, None, None])
    want = (weights / total.clamp_min(1e-300)) @ value.repeat_interleave(2, 1)
    seeing = dense.any(3).expand(2, 6, 150)
    torch.testing.assert_close(got[seeing], want[seeing])
    ours = torch.autograd.grad(got[seeing].square().sum(), (query, key, value), retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(want[seeing].square().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_torchs_flex_attention_reads_the_mask_as_rows_do(monkeypatch):
    """The reference that torch's kernels are made after, in which alone a CPU has gradients; torch refuses them by a check."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    query, key, value = random_heads(dtype=torch.float32)
    rule, dense = windowed()
    mask, seeing = make_block_mask(rule, 2, 150, CPU), dense.any(3).expand(2, 6, 150)
    outputs = [
        torch_flex.flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True),
        attend_by_rows(query, key, value, mask, 0.3),
    ]
    torch.testing.assert_close(outputs[1][seeing], outputs[0][seeing], rtol=1e-5, atol=1e-6)
    flex, rows = (torch.autograd.grad(o[seeing].square().sum(), (query, key, value)) for o in outputs)
    for a, b in zip(rows, flex, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_tile_is_whole_or_in_part_as_the_rule_says():
    rule, dense = windowed()
    mask = make_block_mask(rule, 2, 150, CPU)
    padded = torch.zeros(2, 256, 256, dtype=torch.bool)
    padded[:, :150, :150] = dense[:, 0]
    tiles = padded.view(2, 2, 128, 2, 128).sum((2, 4))
    assert (mask.to_dense()[:, 0].bool() == (tiles > 0)).all()
    plain = make_block_mask(lambda _b, _h, q, k: q >= k, 1, 384, CPU)
    assert plain.full_kv_num_blocks.flatten().tolist() == [0, 1, 2]
    assert plain.kv_num_blocks.flatten().tolist() == [1, 1, 1]


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize(("setting", "quadratic"), [("sdpa", True), ("flex", False)])
def test_no_tensor_grows_with_the_square_of_the_block(setting, quadratic):
    length = 3000
    config = AutoConfig.for_model(
        "llama", vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=length,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    documents = (torch.arange(length) // 700)[None]
    with attention_setting(setting), Largest() as largest:
        inputs = model_inputs(Blocks(torch.ones(1, length, dtype=torch.int64), document_ids=documents))
        final_hidden(model, inputs).sum().backward()
    assert (largest.numel >= length**2) == quadratic
    assert quadratic or largest.numel <= 2**22


def test_bytes_of_a_mask():
    rule = lambda _b, _h, q, k: (q >= k) & (q // 100 == k // 100)  # noqa: E731
    assert mask_nbytes(make_block_mask(rule, 1, 2048, CPU)) == 4 * (4 * 16 + 4 * 16**2)
    assert mask_nbytes(torch.ones(1, 1, 2048, 2048, dtype=torch.bool)) == 2048**2 and mask_nbytes(None) == 0


def tiny(**changes):
    config = AutoConfig.for_model(
        "llama", vocab_size=11, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_how_a_model_attends_is_chosen_by_setting_device_and_model(monkeypatch):
    cuda, model = torch.device("cuda", 0), tiny()
    assert use_attention(model, CPU) == use_attention(model, cuda) == "sdpa"  # no triton here
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(attention, "_kernel_fault", lambda *_: "")
    assert use_attention(model, cuda) == model.config._attn_implementation == "moe2dense_auto"
    assert use_attention(model, CPU) == model.config._attn_implementation == "sdpa"
    with attention_setting("sdpa"):
        assert use_attention(model, cuda) == "sdpa"
    with attention_setting("flex"):
        assert use_attention(model, CPU) == use_attention(model, cuda) == "moe2dense_flex"
        with eager_attention(model.config):
            assert use_attention(model, cuda) == "eager"
        with pytest.raises(UserError, match="attention_dropout=0.1"):
            use_attention(tiny(attention_dropout=0.1), cuda)
        with pytest.raises(UserError, match="heads of 8 numbers"):
            use_attention(tiny(head_dim=8), cuda)
    assert use_attention(tiny(head_dim=8), cuda) == "sdpa"
    model.config._attn_implementation = "eager"  # a user's own choice
    assert use_attention(model, cuda) == "eager"
    with pytest.raises(UserError, match="attention must be one of auto, sdpa, flex"), attention_setting("fast"):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_computing_activations_again_gives_the_same_gradients(checkpointing):
    model = tiny().train()
    ids, documents, real = packed()
    inputs = model_inputs(Blocks(ids % 11, document_ids=documents))
    want = values_and_gradients(model, "sdpa", inputs, real)
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = values_and_gradients(model, "flex", inputs, real)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(got[1], want[1])


def test_a_model_set_to_tiles_writes_the_same_text_and_saves_the_same_config():
    model, ids = tiny().eval(), torch.tensor([[0, 0, 0, 3, 4, 5, 6], [3, 9, 8, 7, 6, 5, 4]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written, saved = model.generate(ids, **options), model.config.to_json_string()
    with attention_setting("flex"):
        assert use_attention(model, CPU) == "moe2dense_flex"
    assert (model.generate(ids, **options) == written).all()
    assert model.config.to_json_string() == saved


def test_kernels_that_do_not_compile_are_said_and_left_out(monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda _: broken)
    real = attention._kernel_fault
    real.cache_clear()
    monkeypatch.setattr(attention, "_kernel_fault", lambda _device, *rest: real(CPU, *rest))
    model = tiny()
    with pytest.warns(UserWarning, match=r"heads of 32 numbers .* do not compile here \(out of resource\)"):
        assert use_attention(model, torch.device("cuda", 0)) == "sdpa"
    with pytest.raises(UserError, match="use --attention auto"), attention_setting("flex"):
        use_attention(model, torch.device("cuda", 0))
    real.cache_clear()


def test_a_gpu_is_given_tiles_and_one_precision(monkeypatch):
    """What reaches torch's kernels on a GPU, by a stand-in for them."""
    calls = []
    monkeypatch.setitem(
        AttentionInterface()._global_mapping, "flex_attention", lambda *a, **k: (calls.append((a, k)), (a[3], None))[1]
    )
    query, key, value = random_heads(dtype=torch.float32)
    mask = make_block_mask(windowed()[0], 2, 150, CPU)
    module = torch.nn.Module()

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    attention._attend(module, query.detach().as_subclass(OnGPU), key, value.half(), mask, 0.3, softcap=2.0)
    ((given, options),) = calls
    assert {t.dtype for t in given[1:4]} == {torch.bfloat16} and given[4] is mask and options["softcap"] == 2.0


def test_short_blocks_and_passes_from_a_cache_have_dense_masks():
    rule = lambda _b, _h, q, k: (q >= k) & (q // 100 == k // 100)  # noqa: E731
    make = AttentionMaskInterface()["moe2dense_auto"]
    common = {"batch_size": 1, "mask_function": rule, "allow_is_causal_skip": False, "device": "cpu"}
    assert isinstance(make(q_length=1024, kv_length=1024, **common), BlockMask)
    assert make(q_length=1000, kv_length=1000, **common).shape == (1, 1, 1000, 1000)
    assert make(q_length=1, kv_length=1200, q_offset=1199, **common).shape == (1, 1, 1, 1200)
    assert make(q_length=2000, kv_length=2000, batch_size=1, mask_function=rule) is None  # plain causal
