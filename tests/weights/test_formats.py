"""Every quantised layout: against its published formula in float64, against compressed-tensors itself, and end to end as a teacher."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import FP4_VALUES, unpack_bits
from moe2dense.weights.formats.find import find_packed
from tests.teacher.families import blocks, make
from tests.weights.packing import LAYOUTS, pack_words

GROUPS = {"targets": ["Linear"], "input_activations": None}


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_values_without_gaps(bits):
    for count in (1, 5, 32, 77):
        codes = torch.randint(0, 2**bits, (3, count))
        packed = pack_words(codes, bits)
        assert packed.shape == (3, -(-count * bits // 32))
        assert torch.equal(unpack_bits(packed, bits, count), codes.int())


def store(folder, tensors, settings):
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(folder)
    return checkpoint, find_packed(checkpoint.tensors, settings)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_equals_the_published_formula_in_float64(tmp_path, name):
    layout = LAYOUTS[name]
    for number, (rows, columns) in enumerate(((16, 64), (32, 128), (8, 192))):
        stored, settings, want = layout("a.b", rows, columns)
        other = torch.randn(3)
        checkpoint, packed = store(
            tmp_path / str(number), {**stored, "c.weight": other, "a.b.bias": other + 1}, settings
        )
        assert list(packed.weights) == ["a.b.weight"]
        assert sorted(packed.names(checkpoint.tensors)) == ["a.b.bias", "a.b.weight", "c.weight"]
        weight = packed.weights["a.b.weight"]
        weight.check(checkpoint)
        assert weight.shape(checkpoint) == (rows, columns)
        got = weight.read(checkpoint)
        # the product of a code and its scale is rounded to float32 once, that of three factors twice
        assert got.dtype == torch.float32 and got.shape == (rows, columns)
        assert (got.double() - want).abs().max() <= want.abs().max() * 2**-23
        assert torch.equal(weight.read(checkpoint, 3, 7), got[3:7])
        assert weight.nbytes(checkpoint) == sum(t.numel() * t.itemsize for t in stored.values())


def compressed(format_, **weights):
    """A config group as compressed-tensors writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"g": GROUPS | {"weights": weights}},
    }


INT = {"num_bits": 4, "type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
LIBRARY = {
    "int4 groups": ("pack-quantized", INT | {"strategy": "group", "group_size": 32}),
    "int4 rows": ("pack-quantized", INT | {"strategy": "channel"}),
    "int4 groups with zero points": (
        "pack-quantized",
        INT | {"symmetric": False, "strategy": "group", "group_size": 32},
    ),
    "int4 rows with zero points": ("pack-quantized", INT | {"symmetric": False, "strategy": "channel"}),
    "int3 groups": ("pack-quantized", INT | {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int8 packed": ("pack-quantized", INT | {"num_bits": 8, "strategy": "channel"}),
    "int8 rows": ("int-quantized", INT | {"num_bits": 8, "strategy": "channel"}),
    "int8 tensor": ("int-quantized", INT | {"num_bits": 8, "strategy": "tensor"}),
    "int8 with zero points": ("int-quantized", INT | {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    "int8 groups": ("naive-quantized", INT | {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "fp8 tensor": ("float-quantized", FLOAT | {"strategy": "tensor"}),
    "fp8 rows": ("float-quantized", FLOAT | {"strategy": "channel"}),
    "fp8 groups": ("naive-quantized", FLOAT | {"strategy": "group", "group_size": 32}),
    "fp8 blocks": ("float-quantized", FLOAT | {"strategy": "block", "block_structure": [16, 48]}),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "group", "group_size": 32}),
}


def library_scales(scheme, rows, columns, dtype):
    """Random scales and zero points in the shapes that compressed-tensors takes."""
    weights = scheme.weights
    shape = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": tuple(-(-n // b) for n, b in zip((rows, columns), weights.block_structure or (1, 1), strict=True)),
    }.get(str(weights.strategy), (rows, columns // (weights.group_size or columns)))
    state = {"weight_scale": (torch.rand(shape) * 0.1 + 0.01).to(dtype)}
    if not weights.symmetric:
        half = 2 ** (weights.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LIBRARY)
def test_equals_compressed_tensors(tmp_path, name, dtype):
    """In the dtype of the scales, in which the library unpacks, the difference is 0."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    format_, weights = LIBRARY[name]
    settings = compressed(format_, **weights)
    arguments = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=format_)
    compressor = compressors.BaseCompressor.get_value_from_registry(format_)
    rows, columns = 32, 96
    state = {"weight": torch.randn(rows, columns).to(dtype), **library_scales(scheme, rows, columns, dtype)}
    if name == "nvfp4":
        state["weight_global_scale"] = torch.rand(1) * 100 + 50
        state["weight_scale"] = (torch.rand(rows, columns // 16) * 50 + 1).float()
    if name == "mxfp4":
        state["weight_scale"] = torch.exp2(torch.randint(-6, 3, (rows, columns // 32)).float()).to(dtype)
    packed = compressor.compress(dict(state), scheme)
    checkpoint, found = store(tmp_path / "c", {f"m.{k}": v.data for k, v in packed.items()}, settings)
    got = found.weights["m.weight"]
    got.check(checkpoint)
    want = compressor.decompress(dict(packed), scheme)["weight"]
    assert got.shape(checkpoint) == (rows, columns)
    assert (got.read(checkpoint).to(want.dtype) - want).abs().max() == 0
    assert want.abs().max() > 0


def test_groups_of_the_config_are_told_by_name(tmp_path):
    """Attention in FP8, experts in INT4, as one checkpoint may have them."""
    groups = {
        "attention": {"targets": ["re:.*self_attn.*"], "weights": FLOAT | {"strategy": "channel"}},
        "experts": {"targets": ["Linear"], "weights": INT | {"strategy": "group", "group_size": 32}},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    fp8, _, first = LAYOUTS["fp8 rows"]("x.self_attn.q_proj", 16, 64)
    int4, _, second = LAYOUTS["int4 groups"]("x.experts.0.up_proj", 16, 64)
    checkpoint, packed = store(tmp_path / "c", fp8 | int4, settings)
    for name, want in (("x.self_attn.q_proj.weight", first), ("x.experts.0.up_proj.weight", second)):
        weight = packed.weights[name]
        weight.check(checkpoint)
        assert (weight.read(checkpoint).double() - want).abs().max() <= want.abs().max() * 2**-23


def quantize_teacher(folder, layout):
    """Rewrite every linear layer of a saved model, experts included, in a layout; return its tensors as they unpack."""
    path, stored, plain, settings = folder / "model.safetensors", {}, {}, {}
    for key, value in load_file(path).items():
        if value.dim() != 2 or "proj" not in key:
            stored[key] = plain[key] = value
            continue
        parts, settings, weight = layout(key.removesuffix(".weight"), *value.shape)
        stored |= parts
        plain[key] = weight.float()
    save_file({k: v.contiguous() for k, v in stored.items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return plain


SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "mlp_only_layers": [0],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_teacher(tmp_path, name):
    """Streamed and resident, a quantised teacher computes what transformers does with the tensors that it stands for."""
    reference = make("qwen3_moe", tmp_path, **SIZES)
    plain = quantize_teacher(tmp_path, LAYOUTS[name])
    reference.save_pretrained(tmp_path / "plain")
    save_file({k: v.contiguous() for k, v in plain.items()}, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    model = type(reference).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    ids = blocks(reference)
    with torch.no_grad():
        want = model(ids).logits
    for memory in ("auto", "17MB"):
        teacher = load_teacher(tmp_path, memory=memory)
        assert teacher.ignored == []
        assert (teacher.run(ids).logits - want).abs().max() <= 2e-4 * want.abs().max()
    expert = teacher.weights.expert_sources("model.layers.1.mlp.experts.down_proj", 3)[0]
    before = teacher.checkpoint.bytes_read
    assert teacher.weights.packed[expert.key].read(teacher.checkpoint).shape == (64, 64)
    read = teacher.checkpoint.bytes_read - before
    # `weight_shape` says two numbers, which are read twice
    assert 0 < read <= teacher.weights.source_bytes(expert) + 32


def test_fp4_table_is_the_formats():
    """E2M1: sign, two bits of exponent with a bias of 1, one of mantissa; subnormal where the exponent is 0."""
    for code, value in enumerate(FP4_VALUES):
        sign, exponent, mantissa = -1 if code >> 3 else 1, (code >> 1) & 3, code & 1
        assert value == sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def refused(tmp_path, settings):
    make("mixtral", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(UserError) as error:
        load_teacher(tmp_path)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "aqlm"}, "quantised with aqlm, which"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in the layout marlin"),
        ({"quant_method": "gptq", "bits": 5}, "gptq in 5 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq in the layout gemv"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "awq without zero points"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt by the algorithm W4A8_AWQ"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "in the layout marlin-24"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "with sparse weights .sparse-24-bitmask",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "rotations that are applied while the model runs",
        ),
    ],
)
def test_what_is_not_read_is_refused_from_the_config(tmp_path, settings, words):
    import re

    message = refused(tmp_path, settings)
    assert re.search(words, message) and "give a checkpoint that is not quantised" in message


@pytest.mark.parametrize(
    ("layout", "part", "value", "words"),
    [
        ("int4 groups", "weight_scale", torch.ones(16, 3), "scales 'a.b.weight_scale' have shape .16, 3."),
        ("int4 groups", "weight_packed", torch.ones(16, 7, dtype=torch.int32), "takes .16, 8. .4 bits a value"),
        ("gptq", "qzeros", torch.ones(2, 3, dtype=torch.int32), "'a.b.qzeros' has shape .2, 3."),
        ("gptq", "scales", torch.ones(3, 16), "'a.b.scales' has shape .3, 16.|'a.b.qzeros' has shape"),
        ("awq", "scales", torch.ones(3, 16), "'a.b.scales' has shape .3, 16., unpacking 'a.b.weight' takes .2, 16."),
        ("nvfp4 modelopt", "weight_scale", torch.ones(16, 3).to(torch.float8_e4m3fn), "takes .16, 4. .one for each 16"),
        ("int8 rows", "weight_scale", torch.ones(5, 1), "have shape .5, 1."),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, layout, part, value, words):
    stored, settings, _ = LAYOUTS[layout]("a.b", 16, 64)
    checkpoint, packed = store(tmp_path / "c", stored | {f"a.b.{part}": value}, settings)
    with pytest.raises(UserError, match=words):
        packed.weights["a.b.weight"].check(checkpoint)


def test_scales_of_activations_are_said(tmp_path):
    make("qwen3_moe", tmp_path, **SIZES)
    quantize_teacher(tmp_path, LAYOUTS["nvfp4 modelopt"])
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.input_scale"
    save_file(load_file(path) | {name: torch.ones(())}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match=f"1 scales of activations are not used .{name}"):
        assert load_teacher(tmp_path).ignored == []


def test_random_layouts_differ():
    """What the tests above compare is not the same each time."""
    random.seed()
    first, second = (LAYOUTS["gptq"]("a", 8, 32)[2] for _ in range(2))
    assert not torch.equal(first, second)
