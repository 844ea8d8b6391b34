"""Block-scaled FP8 and MXFP4 checkpoints against brute force, against transformers' unpacking, and end to end."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.formats.fp8 import scale_grid, unpack_fp8
from moe2dense.weights.formats.mxfp4 import unpack_mxfp4
from tests.teacher.families import FAMILIES, blocks, make

FP8 = torch.float8_e4m3fn


def to_fp8(weight, block):
    """(FP8 weight, scales) with one scale per block, the last ones smaller."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    out = torch.empty(rows, columns, dtype=FP8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[part].abs().max() / 448
            out[part] = (weight[part] / scale[i, j]).to(FP8)
    return out, scale


def quantize_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": fields}))


@pytest.mark.parametrize("shape", [(7, 11), (8, 6), (1, 13), (5, 3)])
def test_fp8_equals_loops(shape):
    weight, scale = torch.randn(shape).to(FP8), torch.rand(-(-shape[0] // 4), -(-shape[1] // 3)) + 0.1
    got = unpack_fp8(weight, scale, (4, 3))
    for i in range(shape[0]):
        for j in range(shape[1]):
            assert got[i, j] == weight[i, j].float() * scale[i // 4, j // 3]
    stacked = unpack_fp8(torch.stack([weight, weight]), torch.stack([scale, 2 * scale]), (4, 3))
    assert torch.equal(stacked[0], got) and torch.equal(stacked[1], 2 * got)


@pytest.mark.parametrize("exponents", [False, True], ids=["float32", "e8m0"])
@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (6, 1), (3, 2), (6, 4), (1, 4), (2, 1)])
def test_fp8_without_a_block_size_equals_transformers(scale, exponents):
    """One scale for the tensor, for a row, or for an even grid; as floats or as exponents of two."""
    weight = torch.randn(6, 4).to(FP8)
    factors = torch.randint(120, 131, scale, dtype=torch.uint8) if exponents else torch.rand(scale) + 0.1
    # transformers' own needs two dimensions where the scales are exponents
    want = Fp8Dequantize(None)._dequantize_one(
        weight, factors.reshape(scale if len(scale) == 2 else (1, 1)), torch.float32
    )
    assert torch.equal(unpack_fp8(weight, factors, None), want)


@pytest.mark.parametrize(
    ("weight", "scale", "factors"),
    [
        ((5, 3), (5,), (5, 1)), ((2, 5, 3), (), (1, 1, 1)), ((2, 5, 3), (2,), (2, 1, 1)), ((2, 5, 3), (2, 1, 1), (2, 1, 1)),
        ((2, 5, 3), (2, 5), (2, 5, 1)), ((2, 5, 3), (2, 5, 1), (2, 5, 1)),
    ],
)  # fmt: skip
def test_fp8_scales_of_tensors_and_rows_in_float64(weight, scale, factors):
    """Whatever the config says of blocks, one scale for each matrix or row is told by its shape."""
    values, scales = torch.randn(weight).to(FP8), torch.rand(scale) + 0.1
    want = (values.double() * scales.double().reshape(factors)).float()
    for block in (None, (128, 128), (4, 3)):
        assert torch.equal(unpack_fp8(values, scales, block), want)


def test_scales_that_do_not_fit():
    for scale in ((3,), (5, 2), (2, 2), (5, 3, 1), (4, 3)):
        assert scale_grid((7, 6), scale, None) is None
    assert scale_grid((7, 6), (4, 3), (2, 2)) == ((4, 3), (2, 2))
    assert scale_grid((8, 6), (4, 3), (128, 128)) is None and scale_grid((8, 6), (4, 3), None) == ((4, 3), (2, 2))
    with pytest.raises(ValueError, match="do not fit"):
        unpack_fp8(torch.ones(7, 6).to(FP8), torch.ones(3), None)


def store_fp8(folder, scale_of, fields):
    """Pack the projections of a saved model; return its tensors as they unpack."""
    path, stored, plain = folder / "model.safetensors", {}, {}
    for key, value in load_file(path).items():
        plain[key] = stored[key] = value
        if value.dim() == 2 and "proj" in key:
            scale = scale_of(value)
            stored[key], stored[key + "_scale_inv"] = (value / scale).to(FP8), scale
            plain[key] = stored[key].float() * scale
    save_file(stored, path, {"format": "pt"})
    quantize_config(folder, quant_method="fp8", activation_scheme="static", **fields)
    return plain


@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_fp8_teacher_with_one_scale_a_tensor_or_row(tmp_path, kind):
    reference = make("deepseek_v3", tmp_path)
    largest = {"tensor": lambda v: v.abs().max(), "row": lambda v: v.abs().amax(1, keepdim=True)}[kind]
    plain = store_fp8(tmp_path, lambda v: largest(v) / 448, {"weight_block_size": None})
    reference.save_pretrained(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    ids = blocks(reference)
    want = load_teacher(tmp_path / "plain").run(ids).logits
    got = load_teacher(tmp_path).run(ids).logits
    assert (got - want).abs().max() <= 1e-4 < (got - reference(ids).logits).abs().max()


def test_scales_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    make("deepseek_v3", tmp_path)
    store_fp8(tmp_path, lambda v: torch.ones(v.shape[0], 1), {"weight_block_size": [5, 7]})
    load_teacher(tmp_path)  # one for a row is told by its shape
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**tensors, name + "_scale_inv": torch.ones(4, 4)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"'{name}_scale_inv' have shape \[4, 4\].* for each block of 5 x 7"):
        load_teacher(tmp_path)
    save_file({**tensors, name + "_scale_inv": torch.ones(11, 1, dtype=torch.int32)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"'{name}_scale_inv' have dtype int32"):
        load_teacher(tmp_path)


def test_mxfp4_equals_transformers():
    packed = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 150, (3, 10, 4), dtype=torch.uint8)
    want = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)  # [E, in, out]
    assert torch.equal(unpack_mxfp4(packed, scales), want.transpose(1, 2))
    assert torch.equal(unpack_mxfp4(packed[1], scales[1]), want[1].T)


@pytest.mark.parametrize("memory", ["auto", "17MB"])
@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2"])
def test_fp8_teacher(tmp_path, name, memory):
    reference = make(name, tmp_path)
    path, block, stored = tmp_path / "model.safetensors", (5, 7), {}
    for key, value in load_file(path).items():
        if key.endswith("proj.weight") or ".experts." in key:
            stored[key], stored[key + "_scale_inv"] = to_fp8(value, block)
        else:
            stored[key] = value
    assert sum(t.dtype == FP8 for t in stored.values()) > 20
    save_file(stored, path, {"format": "pt"})
    quantize_config(tmp_path, quant_method="fp8", weight_block_size=block)
    plain = {
        k: unpack_fp8(v, stored[k + "_scale_inv"], block) if v.dtype == FP8 else v
        for k, v in stored.items()
        if not k.endswith("_scale_inv")
    }
    reference.save_pretrained(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    dequantized = type(reference).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    dequantized.set_experts_implementation("eager")
    ids = blocks(reference)
    teacher = load_teacher(tmp_path, memory=memory)
    assert teacher.ignored == []
    with torch.no_grad():
        want = dequantized.eval()(ids).logits
    assert (teacher.run(ids).logits - want).abs().max() <= 1e-4
    assert (want - reference(ids).logits).abs().max() > 1e-3  # FP8 did change the model


@pytest.mark.parametrize("memory", ["auto", "17MB"])
def test_mxfp4_teacher(tmp_path, memory):
    reference = make("gpt_oss", tmp_path, **{**FAMILIES["gpt_oss"], "hidden_size": 64, "intermediate_size": 96})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for index, layer in enumerate(reference.model.layers):
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, part)  # [E, in, out]
            e, columns, rows = weight.shape
            packed = torch.randint(0, 256, (e, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 127, (e, rows, columns // 32), dtype=torch.uint8)
            weight.copy_(convert_moe_packed_tensors(packed, scales, dtype=torch.float32))
            del tensors[f"model.layers.{index}.mlp.experts.{part}"]
            tensors[f"model.layers.{index}.mlp.experts.{part}_blocks"] = packed
            tensors[f"model.layers.{index}.mlp.experts.{part}_scales"] = scales
    save_file(tensors, path, {"format": "pt"})
    quantize_config(tmp_path, quant_method="mxfp4")
    ids = blocks(reference)
    teacher = load_teacher(tmp_path, memory=memory)
    assert teacher.ignored == []
    assert (teacher.run(ids).logits - reference(ids).logits).abs().max() <= 1e-4
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(teacher.tensor(name), reference.model.layers[1].mlp.experts.gate_up_proj)
