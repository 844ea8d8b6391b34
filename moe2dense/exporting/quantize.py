"""Write int8 or int4 weights in the compressed-tensors layout, which vLLM and transformers read; calibrate and judge them."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, PreTrainedModel

from moe2dense.common.devices import CPU, moved_to
from moe2dense.errors import UserError
from moe2dense.exporting import hf, verify
from moe2dense.exporting.gptq import Rounded, round_weight
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.forward import evaluation_mode
from moe2dense.modeling.load import load_model

# N blocks, S block length, V vocabulary, I inputs of a linear layer

BITS = {"int8": 8, "int4": 4}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "I8": 1}  # by safetensors' names
GROUPS = (128, 64, 32)  # columns per scale that the fast kernels know
GRAM_BYTES = 4 * 10**9  # calibration statistics held at a time
LEFT_OVER = 0.01  # share of the decoder layers' bytes that may stay in matrices of 16 bits


def package() -> Any:
    """Return the compressed-tensors package. Raises UserError saying how to get it."""
    try:
        import compressed_tensors
    except ImportError as error:
        raise UserError("quantize: compressed-tensors is needed; pip install 'moe2dense[quantize]'") from error
    return compressed_tensors


def write_quantized(
    model: PreTrainedModel,
    folder: Path,
    source: hf.TokenizerSource | None,
    *,
    bits: str,
    text: Tensor | None,
    max_kl: float = 0.1,
    shard_size: str | int = "5GB",
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Write `model` with its decoder layers' linear weights in `bits` (int8 or int4) and the rest in bf16, and judge it.

    text [N, S] token ids: the first half calibrates (GPTQ), the second judges; both are computed on `device` where the models fit
    there. Return what was checked and the KL from the student to the quantised student. Raises UserError without text or when
    that KL exceeds `max_kl`.
    """
    package()
    if text is None or len(text) < 2:
        raise UserError("quantize: text of at least two blocks is needed, to calibrate and to judge; pass --data")
    half = len(text) // 2
    check_layers(model)
    layers = linear_layers(model)
    group = group_size(layers)
    with moved_to(model, device):
        rounded = {
            name: layer.moved(CPU) for name, layer in quantized_layers(model, layers, text[:half], BITS[bits], group)
        }
    hf.write_model(model, folder, source, "bfloat16", shard_size, packed_state(model, rounded, BITS[bits]))
    hf.edit_json(folder / "config.json", quantization_config=settings(layers, model, BITS[bits], group))
    check_bytes(folder, bits)
    loaded = load_quantized(folder)
    compare_quantized(loaded, model, rounded)
    with moved_to(model, device), moved_to(loaded, device):
        kl = divergence(model, loaded, text[half:])
    if not kl <= max_kl:
        raise UserError(
            f"quantize: {bits} moves the student by {kl:.3g} nats per token, more than max_kl = {max_kl:g}; "
            "use int8, or raise --max-kl if that is acceptable"
        )
    return {"checked": {"tensors": len(model.state_dict())}, "quantized": {"kl": kl, "tokens": text[half:].numel()}}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder layers by name; embeddings and the output head stay as they are."""
    skip = {model.get_output_embeddings(), model.get_input_embeddings()}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in skip}


def check_layers(model: PreTrainedModel) -> None:
    """Raise UserError for a model, with or without storage, most of whose weights would stay as they are.

    Such are one-expert hosts, which keep their FFNs as parameters [experts, inputs, outputs] and not as linear layers.
    """
    layers = decoder_layers(model)
    linears = {id(m.weight) for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)}
    matrices = [(n, p) for n, p in layers.named_parameters() if _is_matrix(p.shape)]
    left = [(n, p.numel()) for n, p in matrices if id(p) not in linears]
    share = sum(size for _, size in left) / max(1, sum(p.numel() for _, p in matrices))
    if share > LEFT_OVER:
        name = max(left, key=lambda entry: entry[1])[0].split(".", 1)[1]
        raise UserError(
            f"quantize: {share:.0%} of the weights of {type(model).__name__}'s layers are no linear layers ({name}) and would stay in "
            "16 bits; export without quantize, or build for a host without experts"
        )


def _is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a tensor is a matrix or several: not a vector, nor the few numbers of a convolution [channels, 1, length]."""
    return len(shape) > 1 and not (len(shape) == 3 and shape[1] == 1)


def check_bytes(folder: Path, bits: str) -> None:
    """Count the bytes of the layers' matrices on disk. Raises UserError where more than LEFT_OVER of them have 16 bits or more."""
    wide = total = 0
    for name, path in verify.checkpoint_tensors(folder).items():
        with safe_open(path, "pt") as file:
            part = file.get_slice(name)
            shape, kind = part.get_shape(), part.get_dtype()
        if ".layers." not in name or not _is_matrix(shape) or name.endswith(".weight_scale"):
            continue
        size = math.prod(shape) * _BYTES[kind]
        total += size
        wide += size if kind in ("BF16", "F16", "F32") else 0
    if wide > LEFT_OVER * total:
        raise UserError(
            f"quantize: {wide / total:.0%} of the layers' bytes are not {bits} after writing; this is not a quantised model"
        )


def group_size(layers: dict[str, nn.Linear]) -> int:
    """Return the columns per scale: the largest of GROUPS that divides every layer's inputs, or 0 (one scale per row)."""
    return next((g for g in GROUPS if all(m.in_features % g == 0 for m in layers.values())), 0)


def quantized_layers(
    model: PreTrainedModel, layers: dict[str, nn.Linear], text: Tensor, bits: int, group: int
) -> Iterator[tuple[str, Rounded]]:
    """Yield (name, rounded weight) of every layer; the text is run once per GRAM_BYTES of statistics."""
    names = list(layers)
    while names:
        batch, gram_bytes = [], 0
        while names and (not batch or gram_bytes + 4 * layers[names[0]].in_features ** 2 <= GRAM_BYTES):
            gram_bytes += 4 * layers[names[0]].in_features ** 2
            batch.append(names.pop(0))
        grams = input_grams(model, {name: layers[name] for name in batch}, text)
        for name in batch:
            weight = layers[name].weight.detach().float()
            yield name, round_weight(weight, grams.pop(name), bits, group or weight.shape[1])


@torch.no_grad()
def input_grams(
    model: PreTrainedModel, layers: dict[str, nn.Linear], text: Tensor, batch: int = 4
) -> dict[str, Tensor]:
    """Return the mean Gram matrix [I, I] of every layer's inputs over the tokens of `text`, fp32."""
    grams = {name: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for name, m in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            grams[name].addmm_(x.T, x)

        return add

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in layers.items()]
    try:
        with evaluation_mode(model):
            for ids in text.split(batch):
                model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram / text.numel() for name, gram in grams.items()}


def packed_state(model: PreTrainedModel, rounded: dict[str, Rounded], bits: int) -> dict[str, Tensor]:
    """Return the tensors on disk: bf16, with each rounded weight replaced by its packed codes, scales and shape."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state = hf.cast_state(model, torch.bfloat16)
    for name, layer in rounded.items():
        shape = state.pop(f"{name}.weight").shape
        state[f"{name}.weight_packed"] = pack_to_int32(layer.codes, bits).contiguous()
        state[f"{name}.weight_scale"] = layer.scale.contiguous()
        state[f"{name}.weight_shape"] = torch.tensor(shape)
    return state


def settings(layers: dict[str, nn.Linear], model: PreTrainedModel, bits: int, group: int) -> dict[str, Any]:
    """Return config.json's quantization_config: symmetric integers in groups of `group` columns, or one scale per row."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore, format="pack-quantized",
                                quantization_status=QuantizationStatus.COMPRESSED)  # fmt: skip
    return json.loads(config.model_dump_json(exclude_none=True))


def compare_quantized(loaded: PreTrainedModel, student: PreTrainedModel, rounded: dict[str, Rounded]) -> None:
    """Check that every tensor reads back as the student's in bf16, or as its codes times scales, a product in bf16.

    Raises VerificationError naming the tensor.
    """
    got = loaded.state_dict()
    for name, tensor in student.state_dict().items():
        layer = rounded.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        want = verify.rounded(tensor if layer is None else layer.weight(), torch.bfloat16)
        if name not in got or not torch.equal(got[name].to(want), want):
            raise verify.VerificationError(
                f"export: tensor {name} differs from the quantised student's after reloading"
            )


def load_quantized(folder: Path) -> PreTrainedModel:
    """Load a quantised checkpoint with transformers, its weights unpacked to fp32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # only to unpack it
        options = CompressedTensorsConfig(dequantize=True)
        model = load_model(folder, quantization_config=options, local_files_only=True)
    return model.eval()


@torch.no_grad()
def divergence(student: PreTrainedModel, other: PreTrainedModel, text: Tensor) -> float:
    """Return the mean KL(student || other) over the tokens of text [N, S], nats per token; one block at a time, fp32.

    Each model computes on its own device.
    """
    total = 0.0
    with evaluation_mode(student):
        for ids in text.split(1):
            p = student(input_ids=ids.to(student.device), use_cache=False).logits.float().log_softmax(-1)
            q = other(input_ids=ids.to(other.device), use_cache=False).logits.float().log_softmax(-1).to(p.device)
            total += (p.exp() * (p - q)).sum().item()
    return max(total / text.numel(), 0.0)
