"""Experts rounded as they are read, against the definitions in float64 and a model whose weights were rounded beforehand."""

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.teacher.fake_quant import BITS, nf4_values, rounded
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

# bitsandbytes' table, from QLoRA's appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_values():
    torch.testing.assert_close(nf4_values(), torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 300), (3, 7), (1, 128)])
def test_rounding_goes_to_the_nearest_level(bits, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    w[0, : shape[1] // 2] = 0
    got, group = rounded(w, bits), {"int8": shape[1], "int4": 128, "nf4": 64}[bits]
    for r in range(shape[0]):
        for a in range(0, shape[1], group):
            part, found = w[r, a : a + group].double(), got[r, a : a + group].double()
            if bits == "int8":
                levels = torch.arange(-127, 128).double() * part.abs().max() / 127
            elif bits == "nf4":
                levels = torch.tensor(NF4).double() * part.abs().max()
            else:
                low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
                step = (high - low) / 15
                levels = (torch.arange(16).double() - round(-low / step if step else 0)) * step
            best = (part[:, None] - levels[None]).abs().min(1).values
            torch.testing.assert_close((part - found).abs(), best, rtol=1e-4, atol=1e-5)
    assert torch.equal(rounded(torch.zeros(2, 9), bits), torch.zeros(2, 9))


@pytest.mark.parametrize("bits", BITS)
def test_the_size_of_the_weights_does_not_matter(bits):
    """Real weights are a hundredth of these, and are rounded as well."""
    w = torch.randn(7, 200, generator=torch.Generator().manual_seed(1))
    for power in (-20, 20):
        assert torch.equal(rounded(w * 2.0**power, bits), rounded(w, bits) * 2.0**power)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_teacher_is_the_rounded_model(family, tmp_path):
    model = make(family, tmp_path)
    ids = blocks(model)
    for layer in model.model.layers:
        module = layer.mlp.experts
        transposed = bool(getattr(module, "is_transposed", False))
        for weight in (module.gate_up_proj, module.down_proj):
            for e in range(len(weight)):
                matrix = weight.data[e].T if transposed else weight.data[e]
                weight.data[e] = rounded(matrix, "int4").T if transposed else rounded(matrix, "int4")
    teacher = load_teacher(tmp_path, memory="64MB", quantize="int4")
    torch.testing.assert_close(teacher.run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    full = load_teacher(tmp_path, memory="64MB").run(ids).logits
    assert not torch.allclose(full, model(ids).logits, atol=1e-2)


def test_more_experts_per_token(tmp_path):
    model = make("mixtral", tmp_path)
    ids = blocks(model)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 4
    torch.testing.assert_close(load_teacher(tmp_path, top_k=4).run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "must be one of int8, int4, nf4"),
        ({"quantize": "int8", "experts": "grouped_mm"}, "experts='grouped_mm' cannot do"),
        ({"top_k": 9}, "between 1 and the teacher's 8 experts"),
    ],
)
def test_bad_input(tiny, options, message):
    with pytest.raises(UserError, match=message):
        load_teacher(tiny, **options)
