"""Write a student as one GGUF file for llama.cpp, tensor by tensor, with its config and tokenizer, and read it back."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.exporting import tokenizer as tokenizers
from moe2dense.exporting.gguf import tools
from moe2dense.exporting.gguf.hosts import HOSTS, GgufHost
from moe2dense.exporting.gguf.package import package
from moe2dense.exporting.gguf.supported import check_supported
from moe2dense.exporting.gguf.tensors import head_size, named_tensors
from moe2dense.exporting.gguf.vocabulary import Vocabulary, read_vocabulary
from moe2dense.exporting.hf import TokenizerSource
from moe2dense.exporting.verify import VerificationError
from moe2dense.families.cards import StudentCard

TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}


def write_gguf(
    model: PreTrainedModel,
    folder: Path,
    source: TokenizerSource | None,
    card: StudentCard,
    *,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    name: str = "",
    text: str = "",
) -> dict[str, Any]:
    """Write `folder`/model-TYPE.gguf (f32, f16, bf16 or q8_0) with the tokenizer of `source`, and compare it with the model.

    A k-quant (tools.py) is made by llama.cpp's own program from that file, with the importance matrix of `text` where there is one. A
    Modelfile for Ollama lies beside it.

    Norms, biases and convolutions stay f32; q8_0 needs rows that are a multiple of 32 and keeps others f16. Return what was
    checked. Raises UserError for a host or tokenizer that GGUF cannot describe, VerificationError naming a tensor.
    """
    gguf = package()
    host = HOSTS.get(model.config.model_type)
    if host is None or (card.moe_shaped and not host.experts):
        known = ", ".join(sorted(HOSTS))
        raise UserError(f"format: gguf does not know the host {model.config.model_type}; it knows {known}")
    check_supported(model, host)
    if source is None:
        raise UserError("tokenizer: a GGUF file holds one; pass --tokenizer")
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    words = read_vocabulary(tokenizers.load_tokenizer(source), int(rows))
    kind = TYPES[dtype if quantize in tools.TYPES else quantize or dtype]
    if quantize in tools.TYPES:
        tools.tool("llama-quantize")  # said before the model is written
    path = folder / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(path, host.arch)
    _write_config(writer, gguf, model, host, kind, name)
    _write_vocabulary(writer, gguf, words)
    plan = [(key, tensor, _type(gguf, kind, key, tensor)) for key, tensor in named_tensors(model, host)]
    for key, tensor, stored in plan:
        _announce(writer, gguf, key, tensor, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, stored in plan:
        writer.write_tensor_data(_stored(gguf, tensor, stored))
    writer.close()
    record: dict[str, Any] = {"checked": check(path, plan)}
    if quantize in tools.TYPES:
        target = folder / f"model-{quantize}.gguf"
        record["checked"] = tools.quantize_file(path, target, quantize, text)
        path.unlink()
        path = target
    generation = model.generation_config
    temperature = generation.temperature if generation is not None and generation.do_sample else None
    context = model.config.max_position_embeddings
    (folder / "Modelfile").write_text(tools.modelfile(path.name, context, temperature), encoding="utf-8")
    return record


def _type(gguf: Any, kind: str, name: str, tensor: Tensor) -> Any:
    """Return the GGML type that a tensor is stored in."""
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or "shortconv.conv" in name or kind == "f32":
        return kinds.F32
    if kind == "q8_0":
        return kinds.Q8_0 if tensor.shape[-1] % 32 == 0 else kinds.F16
    return {"f16": kinds.F16, "bf16": kinds.BF16}[kind]


def _announce(writer: Any, gguf: Any, name: str, tensor: Tensor, stored: Any) -> None:
    """Tell the writer a tensor's type and bytes, so that the data can follow one tensor at a time."""
    shape = tuple(tensor.shape)
    element = np.dtype({"F32": np.float32, "F16": np.float16}.get(stored.name, np.uint8))
    if element == np.uint8:  # blocks: the last axis is counted in bytes
        shape = gguf.quant_shape_to_byte_shape(shape, stored)
    writer.add_tensor_info(name, shape, element, int(np.prod(shape)) * element.itemsize, stored)


def _stored(gguf: Any, tensor: Tensor, stored: Any) -> np.ndarray:
    return gguf.quants.quantize(np.ascontiguousarray(tensor.float().cpu().numpy()), stored)


def _write_config(writer: Any, gguf: Any, model: PreTrainedModel, host: GgufHost, kind: str, name: str) -> None:
    config: Any = model.config
    writer.add_name(name or "student")
    writer.add_type("model")
    types = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window and not host.sliding_every and getattr(config, "use_sliding_window", True):
        context = min(context, window)  # these architectures attend to everything; within the window that is the same
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
    width = config.intermediate_size
    if not host.experts:
        width = next(p.shape[0] for n, p in model.named_parameters() if f".{host.width}.weight" in n)
    writer.add_feed_forward_length(width)
    heads_kv: Any = config.num_key_value_heads
    if host.conv:
        heads_kv = [config.num_key_value_heads if t == "full_attention" else 0 for t in config.layer_types]
    writer.add_head_count(config.num_attention_heads)
    head_dim = head_size(config)
    if host.latent:
        head_dim = config.qk_rope_head_dim
        _write_latent(writer, config)
    else:
        writer.add_head_count_kv(heads_kv)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    getattr(writer, f"add_{host.norm}")(getattr(config, host.eps))
    for key, source in host.keys.items():
        getattr(writer, f"add_{key}")(getattr(config, source) if isinstance(source, str) else source)
    if host.sigmoid:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if host.dense_lead:
        writer.add_leading_dense_block_count(config.num_hidden_layers)
    _check_layers(config, host)
    _write_rope(writer, gguf, config, host, head_dim)


def _write_latent(writer: Any, config: Any) -> None:
    """Write the sizes of multi-head latent attention, whose cache llama.cpp treats as one head for all queries."""
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)


def _check_layers(config: Any, host: GgufHost) -> None:
    if not host.sliding_every:
        return
    for i, kind in enumerate(config.layer_types):
        if (kind == "full_attention") != ((i + 1) % host.sliding_every == 0):
            raise UserError(f"format: gguf fixes which layers of {host.arch} see everything; layer {i} is {kind}")


def _write_rope(writer: Any, gguf: Any, config: Any, host: GgufHost, head_dim: int) -> None:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor") or 1.0
    if (share != 1.0 and not host.partial) or kind not in ("default", "llama3", "linear", "yarn"):
        raise UserError(f"format: gguf export does not know rope {rope}; export --format hf")
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(head_dim * share) if host.partial else head_dim)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        scales = {
            k: v for k, v in rope.items() if k in ("attention_factor", "mscale", "mscale_all_dim") and v is not None
        }
        if host.latent and set(scales) == {"mscale", "mscale_all_dim"} and len(set(scales.values())) == 1:
            # both scale alike, so that the rotation is left alone, and llama.cpp scales the scores as the model does
            writer.add_rope_scaling_yarn_log_mul(0.1 * scales["mscale_all_dim"])
        elif scales:
            raise UserError(
                "format: gguf export does not know a yarn rope with an attention factor of its own; export --format hf"
            )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _write_vocabulary(writer: Any, gguf: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.add_space_prefix is not None:
        writer.add_add_space_prefix(words.add_space_prefix)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    for name, i in words.special.items():
        getattr(writer, f"add_{name}_token_id")(i)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def check(path: Path, plan: list[tuple[str, Tensor, Any]]) -> dict[str, float]:
    """Read the file back and check that every tensor equals the student's, rounded to its type; q8_0 within half a step."""
    gguf = package()
    remaining = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor, stored in plan:
        got = remaining.pop(name, None)
        if got is None or got.tensor_type != stored:
            raise VerificationError(f"export: tensor {name} is not in {path.name} as {stored.name}")
        want = tensor.float().cpu().numpy()
        values = gguf.quants.dequantize(got.data, got.tensor_type).reshape(want.shape)
        if stored == gguf.GGMLQuantizationType.Q8_0:
            step = np.abs(want.reshape(-1, 32)).max(1) / 127
            # the step itself is stored in f16
            good = (np.abs(values - want).reshape(-1, 32) <= step[:, None] * (0.51 + 127 / 1024) + 1e-7).all()
        else:
            exact = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored.name]
            good = np.array_equal(values, tensor.detach().cpu().to(exact).float().numpy())
        if not np.isfinite(values).all():
            raise UserError(f"export: tensor {name} has values that are not finite in {stored.name}")
        if not good:
            raise VerificationError(f"export: tensor {name} differs from the student's after reading {path.name} back")
    if remaining:
        raise VerificationError(f"export: tensor {min(remaining)} in {path.name} is not part of the student")
    return {"tensors": len(plan)}
