"""Quantise a GGUF file with llama.cpp's own tools: k-quants, with an importance matrix of a text where one is given.

The tools are llama.cpp's programs `llama-quantize` and `llama-imatrix`, found on PATH. They come with its releases and its builds.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from moe2dense.errors import UserError
from moe2dense.exporting.gguf.package import package
from moe2dense.exporting.verify import VerificationError

TYPES = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs")
_LARGEST_ERROR = {"q2_k": 0.6, "q3_k_m": 0.35, "q4_k_m": 0.2, "iq4_xs": 0.2, "q5_k_m": 0.1, "q6_k": 0.06}
_HELP = "build llama.cpp or get one of its releases, and put its programs on PATH"


def tool(name: str) -> str:
    """Return the path of one of llama.cpp's programs. Raises UserError saying how to get it."""
    path = shutil.which(name)
    if path is None:
        raise UserError(
            f"quantize: k-quants are made by llama.cpp's {name}, which is not on PATH; {_HELP}, or choose q8_0"
        )
    return path


def quantize_file(source: Path, target: Path, kind: str, text: str = "") -> dict[str, float]:
    """Write `target`, the GGUF file `source` (f32, f16 or bf16) in a k-quant; return what was checked.

    text: what the importance matrix is computed on; "" for none. Raises UserError where a tool is missing or fails, VerificationError
    naming a tensor that is gone or further from the source than this type can be.
    """
    command = [tool("llama-quantize")]
    if text:
        matrix = target.with_suffix(".imatrix")
        words = target.with_suffix(".txt")
        words.write_text(text, encoding="utf-8")
        _run([tool("llama-imatrix"), "-m", str(source), "-f", str(words), "-o", str(matrix)])
        command += ["--imatrix", str(matrix)]
    _run([*command, str(source), str(target), kind.upper()])
    for left in (target.with_suffix(".imatrix"), target.with_suffix(".txt")):
        left.unlink(missing_ok=True)
    return _check(source, target, kind)


def _run(command: list[str]) -> None:
    """Run a tool. Raises UserError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"quantize: {Path(command[0]).name} failed ({lines[-1][:200] if lines else done.returncode}); try another type"
        )


def _check(source: Path, target: Path, kind: str) -> dict[str, float]:
    """Compare the files tensor by tensor; return the largest error of a matrix, relative to its size."""
    gguf = package()
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    if before.keys() != after.keys():
        name = min(before.keys() ^ after.keys())
        raise VerificationError(f"export: tensor {name} is not in both {source.name} and {target.name}")
    worst = 0.0
    for name, tensor in before.items():
        error = _relative(_values(gguf, tensor), _values(gguf, after[name]))
        if not error <= _LARGEST_ERROR[kind]:
            raise VerificationError(
                f"export: tensor {name} in {target.name} differs by {error:.2g} of its size, too much for {kind}"
            )
        worst = max(worst, error)
    return {"tensors": len(before), "largest_error": worst}


def _values(gguf: Any, tensor: Any) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)


def _relative(wanted: np.ndarray, got: np.ndarray) -> float:
    """Return the size of the difference relative to what is wanted."""
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(wanted - got)) / size if size else float(np.linalg.norm(got))


def modelfile(file: str, context: int, temperature: float | None = None) -> str:
    """Return the Modelfile with which `ollama create NAME -f Modelfile` takes a GGUF file. Ollama reads its chat template."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}"]
    if temperature is not None:
        lines.append(f"PARAMETER temperature {temperature:g}")
    return "\n".join(lines) + "\n"
