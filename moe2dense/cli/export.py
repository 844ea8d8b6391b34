"""`moe2dense export`: a run's student, or any dense checkpoint, for serving."""

import sys
from pathlib import Path
from typing import Literal


def export_checkpoint(
    what: str,
    /,
    *,
    out: Path,
    format: Literal["hf", "gguf"] = "hf",
    quantize: Literal["int8", "int4", "q8_0"] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    shard_size: str = "5GB",
    tokenizer: str | None = None,
    data: str | None = None,
    max_kl: float = 0.1,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    yes: bool = False,
) -> None:
    """Write a student for transformers and vLLM (hf) or llama.cpp (gguf), and check what was written.

    Parameters
    ----------
    what: folder of a run, of a step of its training (RUN/checkpoints/step-...) or of a dense checkpoint
    out: new folder
    format: hf or gguf
    quantize: int8 or int4 (hf, needs --data), q8_0 (gguf)
    dtype: of the weights
    shard_size: largest weight file
    tokenizer: folder with the tokenizer; default the teacher's
    data: text that calibrates and judges the quantised weights
    max_kl: refuse a quantised model further than this from the unquantised, nats per token
    overwrite: replace --out
    push_to_hub: repository (NAMESPACE/NAME) to upload the export to, private unless it exists or --public
    public: create that repository public
    yes: upload without asking
    """
    from rich.console import Console

    from moe2dense.common.units import show_bytes
    from moe2dense.errors import UserError
    from moe2dense.exporting.api import export
    from moe2dense.student.open import is_run, open_student, student_folder

    if push_to_hub and not yes and not sys.stdin.isatty():
        raise UserError("--push-to-hub asks before it uploads, and there is no terminal to ask on; add --yes")
    student = open_student(what)
    source = tokenizer or student.teacher_path or str(student_folder(what))
    text = None
    if quantize in ("int8", "int4"):
        if data is None:
            raise UserError(f"--quantize {quantize} needs --data, the text that calibrates and judges it")
        text = _calibration_text(data, source, student.model)
    info = _card_info(Path(what)) if is_run(Path(what)) else None
    done = export(
        student, out, tokenizer=source, info=info, dtype=dtype, format=format, quantize=quantize,
        shard_size=shard_size, text=text, max_kl=max_kl, overwrite=overwrite,
    )  # fmt: skip
    console = Console()
    console.print(f"{done.path}: {show_bytes(done.bytes)} in {len(done.files)} files")
    for name, value in (done.checked | done.quantized).items():
        console.print(f"  {name.replace('_', ' ')}: {value:.4g}")
    if push_to_hub:
        console.print(_push(done.path, push_to_hub, public, yes))


def _push(folder: Path, repo_id: str, public: bool, yes: bool) -> str:
    from rich.prompt import Confirm

    from moe2dense.exporting.hub import push_to_hub

    return push_to_hub(folder, repo_id, private=not public, confirm=None if yes else Confirm.ask)


def _calibration_text(data: str, tokenizer: str, model):
    from transformers import AutoTokenizer

    from moe2dense.data.load import load_blocks

    block = min(256, model.config.max_position_embeddings)
    return load_blocks(data, AutoTokenizer.from_pretrained(tokenizer), block, "valid", tokens=64 * block).input_ids


def _card_info(run: Path) -> dict:
    from moe2dense.exporting.card_info import card_info
    from moe2dense.reporting.report_file import read_report

    return card_info(read_report(run))
