"""Export a student, and upload it, as `moe2dense export` asks."""

from pathlib import Path

from rich.console import Console
from rich.prompt import Confirm
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.object_store import is_url
from moe2dense.common.units import show_bytes
from moe2dense.conversion.stack_check import check_export
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.exporting.card_info import card_info
from moe2dense.exporting.gguf.tools import TYPES as K_QUANTS
from moe2dense.exporting.hf import torch_dtype
from moe2dense.exporting.hub import push_to_hub
from moe2dense.exporting.remote import check_room, export_folder
from moe2dense.exporting.stacks import STACKS, check_stack, format_for
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.reporting.report_file import read_report, report_errors
from moe2dense.student.locate import is_run, student_folder
from moe2dense.student.open import open_student

_CALIBRATION_BLOCKS, _CALIBRATION_LENGTH = 64, 256


def run_export(
    what: str,
    out: str | Path,
    *,
    format: str,
    quantize: str | None,
    dtype: str,
    shard_size: str,
    tokenizer: str | None,
    data: str | None,
    max_kl: float,
    device: str,
    overwrite: bool,
    stack: str = "",
) -> None:
    """Write the student that `what` names to `out`, a folder or a URL, and print what was written and checked. Raises UserError."""
    with export_folder(out, overwrite) as folder:
        student = open_student(what)
        if stack:
            check_stack(student.card, STACKS[stack])
            format = format_for(STACKS[stack], format)
        check_room(out, student.model.num_parameters() * torch_dtype(dtype).itemsize)
        source = tokenizer or student.teacher_path or str(student_folder(what))
        text = _calibration_text(data, source, student.model) if data and quantize in ("int8", "int4") else None
        info = None
        if is_run(Path(what)):
            report = read_report(what)
            with report_errors(what):
                info = card_info(report)
        exported = export(
            student,
            folder,
            tokenizer=source,
            info=info,
            dtype=dtype,
            format=format,
            quantize=quantize,
            shard_size=shard_size,
            text=text,
            words=_words(data, source) if data and quantize in K_QUANTS else "",
            max_kl=max_kl,
            overwrite=overwrite,
            device=device,
        )
        console = Console()
        console.print(f"{out}: {show_bytes(exported.bytes)} in {len(exported.files)} files")
        for name, value in (exported.checked | exported.quantized).items():
            console.print(f"  {name.replace('_', ' ')}: {value:.4g}")
        if stack and not quantize:
            console.print(f"trying the export in {stack} ...", highlight=False)
            check = check_export(student, folder, stack)
            if check.failure:
                place = "nothing was uploaded" if is_url(out) else f"the export is in {out}"
                raise UserError(f"--for {stack}: {check.failure}; {place}")
            console.print(check.sentence(), highlight=False, markup=False)
        if is_url(out):
            console.print("uploading ...")


def push(folder: Path, repository: str, public: bool, yes: bool) -> None:
    """Upload an export to a repository of the hub, after asking; print where it is."""
    Console().print(push_to_hub(folder, repository, private=not public, confirm=None if yes else Confirm.ask))


def _words(data: str, tokenizer: str) -> str:
    """Return the text that an importance matrix is computed on."""
    source = load_tokenizer(tokenizer)
    blocks = load_blocks(data, source, _CALIBRATION_LENGTH, "valid", tokens=_CALIBRATION_BLOCKS * _CALIBRATION_LENGTH)
    return "\n".join(str(source.decode(ids, skip_special_tokens=True)) for ids in blocks.input_ids.tolist())


def _calibration_text(data: str, tokenizer: str, model: PreTrainedModel) -> Tensor:
    block = min(_CALIBRATION_LENGTH, model.config.max_position_embeddings)
    tokens = _CALIBRATION_BLOCKS * block
    return load_blocks(data, load_tokenizer(tokenizer), block, "valid", tokens=tokens).input_ids
