"""Check quantised teachers: what is unpacked against the libraries' own dequantisation, and the bytes that a streamed token costs.

A random Qwen3-MoE is written in every layout that is read, and streamed once. For each: the largest difference to what the library
computes in its own dtype (compressed-tensors; AutoAWQ, GPTQModel and ModelOpt have no light package, so their published formula in
float64 stands in, rounded to float32), bytes of one expert, and bytes read for each token of the text. Every token uses every expert,
so that all of them are read.

    python benchmarks/precisions.py [--tokens 4096]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.find import find_packed

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.weights.packing import LAYOUTS, Layout

NAME = "m"
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 16,
}  # fmt: skip


def library_values(stored: dict[str, Tensor], settings: dict) -> Tensor | None:
    """Return what compressed-tensors unpacks, in its own dtype; None for other methods, or where it is not installed."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        return None
    if settings["quant_method"] != "compressed-tensors":
        return None
    (group,) = settings["config_groups"].values()
    scheme = QuantizationScheme(**group, format=settings["format"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor.decompress({k.removeprefix(f"{NAME}."): v for k, v in stored.items()}, scheme)["weight"]


def difference(layout: Layout, folder: Path) -> tuple[float, str]:
    """Return the largest difference on a random matrix, and to whose values."""
    stored, settings, formula = layout(NAME, 256, 512)
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    (weight,) = find_packed(checkpoint.tensors, settings).weights.values()
    weight.check(checkpoint)
    values, by_library = weight.read(checkpoint), library_values(stored, settings)
    expected, whose = (formula.float(), "formula") if by_library is None else (by_library, "compressed-tensors")
    return float((values.to(expected.dtype) - expected).abs().max()), whose


def quantize(source: Path, folder: Path, layout: Layout) -> None:
    """Write a model with every projection, experts included, in a layout; projections of one shape share the layout's random values."""
    stored: dict[str, Tensor] = {}
    settings: dict = {}
    patterns: dict[torch.Size, dict[str, Tensor]] = {}
    for key, value in load_file(source / "model.safetensors").items():
        if value.dim() != 2 or "proj" not in key:
            stored[key] = value
            continue
        if value.shape not in patterns:
            patterns[value.shape], settings, _ = layout(NAME, *value.shape)
        module = key.removesuffix(".weight")
        stored |= {module + name.removeprefix(NAME): part.clone() for name, part in patterns[value.shape].items()}
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))


def streamed_bytes(folder: Path, ids: Tensor) -> tuple[int, float]:
    """Return (stored bytes of one expert, bytes read for each token of one pass over `ids`)."""
    teacher = load_teacher(folder, memory="30MB", experts="streamed")
    experts = teacher.layer(0).experts
    assert experts is not None
    before = teacher.checkpoint.bytes_read
    teacher.run(ids)
    return experts.nbytes(0), (teacher.checkpoint.bytes_read - before) / ids.numel()


def main() -> None:
    """Print one row for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text that is streamed")
    tokens = parser.parse_args().tokens
    torch.manual_seed(0)
    ids = torch.randint(3, SIZES["vocab_size"], (max(1, tokens // 128), 128))
    print(f"{'layout':28} {'difference':>10} {'to':20} {'expert':>9} {'bytes/token':>12} {'of bfloat16':>11}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES), dtype=torch.bfloat16)
        model.save_pretrained(source)
        expert, plain = streamed_bytes(source, ids)
        print(f"{'bfloat16, not quantised':28} {'':10} {'':20} {expert:9,} {plain:12,.0f} {'100%':>11}")
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            folder = Path(place) / str(number)
            (Path(place) / f"matrix{number}").mkdir()
            largest, whose = difference(layout, Path(place) / f"matrix{number}")
            quantize(source, folder, layout)
            expert, read = streamed_bytes(folder, ids)
            worst = max(worst, largest)
            print(f"{name:28} {largest:10.3g} {whose:20} {expert:9,} {read:12,.0f} {read / plain:11.0%}", flush=True)
    print(f"largest difference of all: {worst:.3g}")
    sys.exit(worst > 0)


if __name__ == "__main__":
    main()
