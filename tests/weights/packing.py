"""Random quantised weights in every layout, each with its config and the float64 values that its published formula gives."""

from collections.abc import Callable
from typing import Any

import torch

# (a layer's name, rows, columns) -> (stored tensors, quantization_config, the weight in float64)
Layout = Callable[[str, int, int], tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]]
FP8 = torch.float8_e4m3fn
# AutoAWQ's order: the value of column i of eight stands at these four bits of a word
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_words(codes, bits):
    """Codes [R, C] -> int32 words [R, ceil(C * bits / 32)], bit by bit."""
    rows, count = codes.shape
    words = [[0] * -(-count * bits // 32) for _ in range(rows)]
    for r in range(rows):
        for i, code in enumerate(codes[r].tolist()):
            for b in range(bits):
                place = i * bits + b
                words[r][place // 32] |= (code >> b & 1) << (place % 32)
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in words], dtype=torch.int32)


def settings(format_, **weights):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}


def scale(*shape):
    return torch.rand(shape) * 0.05 + 0.01


def by_block(values, block, shape):
    """One value for each entry of a matrix, from one for each block."""
    return values.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def packed_integers(bits, block, zero_points=False):
    """pack-quantized of compressed-tensors."""

    def layout(name, rows, columns):
        height, width = block[0], block[1] or columns
        grid = (-(-rows // height), -(-columns // width))
        codes, half = torch.randint(0, 2**bits, (rows, columns)), 2 ** (bits - 1)
        scales = scale(*grid)
        stored = {
            f"{name}.weight_packed": pack_words(codes, bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }
        zeros = torch.full(grid, half)
        if zero_points:
            zeros = torch.randint(0, 2**bits, grid)
            stored[f"{name}.weight_zero_point"] = pack_words(zeros.T, bits).T
        size = (height, width)
        weight = (codes.double() - by_block(zeros, size, codes.shape)) * by_block(scales, size, codes.shape)
        strategy = {"strategy": "group", "group_size": block[1]} if block[1] else {"strategy": "channel"}
        return (
            stored,
            settings("pack-quantized", num_bits=bits, type="int", **strategy, symmetric=not zero_points),
            weight,
        )

    return layout


def int8_rows(name, rows, columns):
    codes, scales = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), scale(rows, 1)
    stored = {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    return (
        stored,
        settings("int-quantized", num_bits=8, type="int", strategy="channel"),
        codes.double() * scales.double(),
    )


def fp8(kind):
    """float-quantized and naive-quantized of compressed-tensors."""

    def layout(name, rows, columns):
        block = {"tensor": (rows, columns), "rows": (1, columns), "groups": (1, 32), "blocks": (8, 16)}[kind]
        codes = torch.randn(rows, columns).to(FP8)
        scales = scale(-(-rows // block[0]), -(-columns // block[1]))
        weight = codes.double() * by_block(scales, block, codes.shape)
        strategy = {
            "tensor": {"strategy": "tensor"},
            "rows": {"strategy": "channel"},
            "groups": {"strategy": "group", "group_size": 32},
            "blocks": {"strategy": "block", "block_structure": list(block)},
        }[kind]
        stored = {f"{name}.weight": codes, f"{name}.weight_scale": scales.flatten() if kind == "tensor" else scales}
        return stored, settings("float-quantized", num_bits=8, type="float", **strategy), weight

    return layout


def fp8_of_the_method(name, rows, columns):
    """`quant_method` fp8 with `weight_scale` and no blocks, as older tools wrote it."""
    codes, scales = torch.randn(rows, columns).to(FP8), torch.rand(()) + 0.1
    stored = {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    return stored, {"quant_method": "fp8", "activation_scheme": "static"}, codes.double() * scales.double()


def fp4_codes(rows, columns):
    """(bytes [R, C / 2], the values of their codes in float64)."""
    codes = torch.randint(0, 16, (rows, columns))
    values = torch.tensor(FP4, dtype=torch.float64)[codes & 7] * torch.where(codes >= 8, -1.0, 1.0).double()
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), values


def nvfp4(divided):
    """NVFP4 of compressed-tensors, whose tensor scale divides, and of ModelOpt, whose tensor scale multiplies."""

    def layout(name, rows, columns):
        packed, values = fp4_codes(rows, columns)
        scales, whole = (torch.rand(rows, columns // 16) * 100 + 1).to(FP8), torch.rand(1) + 0.5
        factors = (scales.float() / whole if divided else scales.float() * whole).double()
        weight = values * by_block(factors, (1, 16), values.shape)
        if divided:
            stored = {
                f"{name}.weight_packed": packed,
                f"{name}.weight_scale": scales,
                f"{name}.weight_global_scale": whole,
            }
            options = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
            return stored, settings("nvfp4-pack-quantized", **options), weight
        stored = {f"{name}.weight": packed, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": whole[0]}
        return stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, weight

    return layout


def mxfp4(name, rows, columns):
    packed, values = fp4_codes(rows, columns)
    exponents = torch.randint(118, 126, (rows, columns // 32), dtype=torch.uint8)
    weight = values * by_block(torch.exp2(exponents.double() - 127), (1, 32), values.shape)
    stored = {f"{name}.weight_packed": packed, f"{name}.weight_scale": exponents}
    options = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    return stored, settings("mxfp4-pack-quantized", **options), weight


def fp8_modelopt(name, rows, columns):
    codes, scales = torch.randn(rows, columns).to(FP8), torch.rand(()) + 0.1
    stored = {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    return stored, {"quant_method": "modelopt", "quant_algo": "FP8"}, codes.double() * scales.double()


def gptq(bits, version="gptq", ordered=True, group=32):
    """AutoGPTQ's layout: codes along the input, zero points along the output, and which group each column is of."""

    def layout(name, rows, columns):
        size = columns if group < 0 else group
        codes, zeros = (
            torch.randint(0, 2**bits, (columns, rows)),
            torch.randint(0, 2**bits, (-(-columns // size), rows)),
        )
        scales, index = scale(len(zeros), rows).half(), torch.arange(columns) // size
        if not ordered:
            index = index[torch.randperm(columns)]
        weight = (codes.double() - zeros[index].double()) * scales.double()[index]
        kept = (zeros - 1) % 2**bits if version == "gptq" else zeros
        stored = {
            f"{name}.qweight": pack_words(codes.T, bits).T,
            f"{name}.qzeros": pack_words(kept, bits),
            f"{name}.scales": scales,
            f"{name}.g_idx": index.int(),
        }
        options = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
        return stored, options, weight.T

    return layout


def gptq_without_index(name, rows, columns):
    stored, options, weight = gptq(4)(name, rows, columns)
    return {k: v for k, v in stored.items() if not k.endswith("g_idx")}, options, weight


def awq(name, rows, columns):
    codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // 32, rows))
    scales, index = scale(len(zeros), rows).half(), torch.arange(columns) // 32
    weight = (codes.double() - zeros[index].double()) * scales.double()[index]

    def packed(values):
        order = torch.empty_like(values)
        for column in range(rows):
            order[:, column // 8 * 8 + AWQ_PLACES[column % 8]] = values[:, column]
        return pack_words(order, 4)

    stored = {f"{name}.qweight": packed(codes), f"{name}.qzeros": packed(zeros), f"{name}.scales": scales}
    options = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return stored, options, weight.T


LAYOUTS: dict[str, Layout] = {
    "int4 groups": packed_integers(4, (1, 32)),
    "int4 rows": packed_integers(4, (1, 0)),
    "int4 zero points": packed_integers(4, (1, 32), zero_points=True),
    "int3 zero points": packed_integers(3, (1, 32), zero_points=True),
    "int8 packed": packed_integers(8, (1, 0)),
    "int8 rows": int8_rows,
    "fp8 tensor": fp8("tensor"),
    "fp8 rows": fp8("rows"),
    "fp8 groups": fp8("groups"),
    "fp8 blocks": fp8("blocks"),
    "fp8 of the method": fp8_of_the_method,
    "fp8 modelopt": fp8_modelopt,
    "nvfp4 compressed-tensors": nvfp4(divided=True),
    "nvfp4 modelopt": nvfp4(divided=False),
    "mxfp4 compressed-tensors": mxfp4,
    "gptq": gptq(4),
    "gptq 2 bits": gptq(2),
    "gptq 3 bits": gptq(3),
    "gptq 8 bits": gptq(8, group=-1),
    "gptq_v2": gptq(4, "gptq_v2"),
    "gptq ordered by activation": gptq(4, ordered=False),
    "gptq without an index": gptq_without_index,
    "awq": awq,
}
