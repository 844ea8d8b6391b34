"""Export a student to a folder that serving stacks load, or to a GGUF file: written whole, checked, with a model card."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.devices import moved_to, pick_device
from moe2dense.common.files import whole_folder
from moe2dense.errors import UserError
from moe2dense.exporting import hf
from moe2dense.exporting import model_card as cards
from moe2dense.exporting import quantize as quantizer
from moe2dense.exporting import tokenizer as tokenizers
from moe2dense.exporting.gguf.tools import TYPES as K_QUANTS
from moe2dense.exporting.gguf.tools import tool
from moe2dense.exporting.gguf.write import write_gguf
from moe2dense.families.cards import StudentCard, student_cards
from moe2dense.modeling.kinds import BuiltStudent

FORMATS = ("hf", "gguf")
HF_QUANTIZE = ("int8", "int4")
GGUF_QUANTIZE = ("q8_0", *K_QUANTS)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote. It can be used where a path is expected."""

    path: Path
    # bytes by file name
    files: dict[str, int]
    # tensors compared, largest logit difference
    checked: dict[str, float] = field(default_factory=dict)
    # KL from the unquantised student, and the tokens it was measured on
    quantized: dict[str, float] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return {
            "path": str(self.path), "files": self.files, "bytes": self.bytes,
            "checked": self.checked, "quantized": self.quantized,
        }  # fmt: skip


def export(
    student: BuiltStudent | PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: hf.TokenizerSource | None = None,
    info: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
    format: str = "hf",
    quantize: str | None = None,
    shard_size: str | int = "5GB",
    text: Tensor | None = None,
    words: str = "",
    score: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
    max_kl: float = 0.1,
    card: StudentCard | None = None,
    overwrite: bool = False,
    device: str | torch.device = "auto",
) -> Exported:
    """Write a student (a Student or a transformers causal LM) to the new folder `out`, and check what was written.

    tokenizer: folder, hub id or object; by default the folder of the student's teacher. Generation defaults and license
    files are copied from it too. info: what the model card says, see model_card.INFO_FIELDS. dtype: bfloat16, float16 or
    float32. format: hf or gguf. quantize: int8 or int4 (hf), which need text [N, S], token ids that calibrate it
    (first half) and judge it (second half), and are refused above max_kl nats per token between student and quantised student; q8_0
    or a k-quant of llama.cpp's own tool (gguf), with an importance matrix of `words` where given.
    score: judges a model for the card's table, e.g. lambda m: evaluate(m, teacher, held_out).to_dict(); called for a
    quantised model, whose row joins the card. overwrite: replace `out`, in one rename. device: where quantised weights are calibrated
    and judged, if the models fit there; `auto` is CUDA where there is one.

    Raises UserError for bad arguments, a place that cannot be written, a host the format does not know or too much lost in
    quantisation; VerificationError (a UserError) naming the tensor when the files are not the student. `out` then does
    not exist.
    """
    model, host = _model_of(student), card or _card_of(student)
    _check_options(model, format, dtype, quantize)
    _check_wrapper(model, host)
    source = tokenizer if tokenizer is not None else _teacher_folder(student)
    notes = _inherit(cards.check_info(info), student, source)
    out, where = Path(out), pick_device(str(device))
    with whole_folder(out, overwrite) as partial:
        if format == "gguf":
            record = write_gguf(
                model,
                partial,
                source,
                host,
                dtype=dtype,
                quantize=quantize,
                name=notes.get("name", out.name),
                text=words,
            )
        elif quantize:
            record = quantizer.write_quantized(
                model, partial, source, bits=quantize, text=text, max_kl=max_kl, shard_size=shard_size, device=where
            )
            if score is not None:
                judged = quantizer.load_quantized(partial)
                with moved_to(judged, where):
                    row = {"name": f"student, {quantize}", "scores": score(judged)}
                notes["rows"] = [*notes.get("rows", []), row]
        else:
            hf.write_model(model, partial, source, dtype, shard_size)
            checked = hf.check_model(model, partial, source, dtype, host.moe_shaped)
            record = {"checked": {"tensors": checked.tensors, "logit_difference": checked.logit_difference}}
        page = cards.model_card(
            out.name, notes, dtype=dtype, parameters=model.num_parameters(), loads=host.loads, moe_shaped=host.moe_shaped,
            quantize=quantize or "", quantized=record.get("quantized"), format=format, notes=host.notes,
        )  # fmt: skip
        (partial / "README.md").write_text(page, encoding="utf-8")
    files = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    return Exported(out, files, **record)


def _model_of(student: BuiltStudent | PreTrainedModel) -> PreTrainedModel:
    """Return the model to write. Raises UserError for adapters that are not merged, or weights that are not in memory."""
    model = student.model if isinstance(student, BuiltStudent) else student
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"student: a Student or a transformers model is needed; found {type(student).__name__}")
    if model._hf_peft_config_loaded or any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError("student: it still has adapters; merge them into the model before exporting")
    if any(p.is_meta for p in model.parameters()):
        raise UserError("student: some of its weights were never loaded (they are on the meta device)")
    return model


def _card_of(student: BuiltStudent | PreTrainedModel) -> StudentCard:
    """Return the host card of a student, or one by the architecture of a model."""
    if isinstance(student, BuiltStudent):
        return student.card
    kind = student.config.model_type
    hosts = [c for c in student_cards().values() if not c.host]
    return next((c for c in hosts if c.model_type == kind), StudentCard(kind, kind, model_type=kind))


def _check_wrapper(model: PreTrainedModel, host: StudentCard) -> None:
    """Refuse a whole mixture: a host that keeps the MoE wrapper has one expert, as its card sets it. Raises UserError."""
    for key, value in host.set.items() if host.moe_shaped else ():
        setting = getattr(model.config, key, None)
        if not isinstance(value, str) and setting != value:
            raise UserError(
                f"student: its config has {key} = {setting}, a dense {host.name} has {value}; export a built student"
            )


def check_quantize(format: str, quantize: str | None) -> None:
    """Raise UserError for a way of quantising that a file layout does not have, or whose program is not installed."""
    known = HF_QUANTIZE if format == "hf" else GGUF_QUANTIZE
    if quantize and quantize not in known:
        raise UserError(f"quantize: {quantize!r} is not known for --format {format}; choose {' or '.join(known)}")
    if quantize in K_QUANTS:
        tool("llama-quantize")


def _check_options(model: PreTrainedModel, format: str, dtype: str, quantize: str | None) -> None:
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is not one of {', '.join(FORMATS)}")
    hf.torch_dtype(dtype)
    check_quantize(format, quantize)
    if getattr(model.config, "quantization_config", None):
        raise UserError("student: it is quantised already; export the checkpoint it was made from")


def _teacher_folder(student: BuiltStudent | PreTrainedModel) -> str | None:
    return (student.teacher_path or None) if isinstance(student, BuiltStudent) else None


def _inherit(
    info: dict[str, Any], student: BuiltStudent | PreTrainedModel, source: hf.TokenizerSource | None
) -> dict[str, Any]:
    """Return `info` with what the student and its teacher's folder know, where it says nothing else."""
    origin = tokenizers.source_folder(source) if source is not None else None
    known = {"teacher": student.teacher_path, "method": student.method} if isinstance(student, BuiltStudent) else {}
    legal = {} if "license" in info else tokenizers.teacher_license(origin)
    return {**{k: v for k, v in known.items() if v}, **legal, **info}
