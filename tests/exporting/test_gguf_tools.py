"""k-quants by llama.cpp's own programs: what they are told, and what is said where they are missing, fail or lose too much."""

import sys

import numpy as np
import pytest

from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.exporting.gguf.tools import modelfile
from moe2dense.exporting.verify import VerificationError
from tests.exporting.conftest import EXAMPLE, tiny

gguf = pytest.importorskip("gguf")
BIG = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
COPY = """#!{python}
import shutil, sys
open({log!r}, "a").write(" ".join(sys.argv) + chr(10))
if "-o" in sys.argv:
    open(sys.argv[sys.argv.index("-o") + 1], "w").write("matrix")
else:
    shutil.copy(sys.argv[-3], sys.argv[-2])
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of llama.cpp's names that write what they are told, and copy the file in the place of quantising it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    log = tmp_path / "log"

    def install(name, script=None):
        (folder / name).write_text(script or COPY.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
        return log

    return install


def quantised(out, **options):
    return export(tiny("mistral", **BIG), out, tokenizer=EXAMPLE, format="gguf", quantize="q4_k_m", **options)


def test_a_missing_program_is_said_before_anything_is_written(programs, tmp_path):
    with pytest.raises(UserError, match="llama-quantize, which is not on PATH; build llama.cpp"):
        quantised(tmp_path / "g")
    assert not (tmp_path / "g").exists()
    programs("llama-quantize")
    with pytest.raises(UserError, match="llama-imatrix, which is not on PATH"):
        quantised(tmp_path / "g", words="some text")
    assert not (tmp_path / "g").exists()


def test_the_programs_are_told_what_to_do(programs, tmp_path):
    log = programs("llama-quantize")
    programs("llama-imatrix")
    done = quantised(tmp_path / "g", words="some text", dtype="float32")
    matrix, quantize = [line.split()[1:] for line in log.read_text().splitlines()]
    assert matrix[0] == "-m" and matrix[1].endswith("model-f32.gguf") and matrix[4] == "-o"
    assert quantize[0] == "--imatrix" and quantize[1] == matrix[5] and quantize[-1] == "Q4_K_M"
    assert set(done.files) == {"model-q4_k_m.gguf", "README.md", "Modelfile"}
    assert done.checked["largest_error"] == 0  # of a copy
    assert (tmp_path / "g" / "Modelfile").read_text().startswith("FROM ./model-q4_k_m.gguf\nPARAMETER num_ctx 256\n")


def test_a_program_that_fails_leaves_nothing(programs, tmp_path):
    programs("llama-quantize", f"#!{sys.executable}\nimport sys\nsys.exit('no such type')\n")
    with pytest.raises(UserError, match="llama-quantize failed .no such type."):
        quantised(tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_too_large_an_error_is_named(programs, tmp_path, monkeypatch):
    programs("llama-quantize")
    monkeypatch.setattr(
        "moe2dense.exporting.gguf.tools._values", lambda _, tensor: np.random.default_rng(id(tensor)).normal(size=9)
    )
    with pytest.raises(VerificationError, match="tensor .* differs by .* too much for q4_k_m"):
        quantised(tmp_path / "g")


def test_a_modelfile_names_the_file_and_its_context():
    assert modelfile("a.gguf", 4096, 0.7) == "FROM ./a.gguf\nPARAMETER num_ctx 4096\nPARAMETER temperature 0.7\n"
