"""The demo notebook: every code cell runs in a real kernel, in order, and what it says of the student is true."""

import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path("examples") / "try_it.ipynb"


@pytest.fixture(scope="module")
def notebook(root):
    return json.loads((root / NOTEBOOK).read_text(encoding="utf-8"))


def test_it_is_stored_without_results(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), "cell", "exec")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.slow
def test_every_cell_runs(root, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MOE2DENSE_DEMO_TOKENS", "12k")
    monkeypatch.setenv("MOE2DENSE_DEMO_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", f"{root}:{os.environ.get('PYTHONPATH', '')}")
    book = nbformat.read(root / NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(root / "examples")}}
    ).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    assert all(cell.execution_count for cell in cells)
    scores, sizes, texts, page = printed[2:]
    kls = {name: float(kl) for name, kl in re.findall(r"^(\w+) +KL from the teacher (\S+)", scores, re.MULTILINE)}
    assert kls["teacher"] == 0 and 0 < kls["student"] < 0.5
    assert "student: MistralForCausalLM, 3." in sizes
    assert texts.count("The captain looked at the sea and") == 2
    assert f"{tmp_path / 'out' / 'report.html'}: " in page
    assert "<iframe" in cells[-1].outputs[-1]["data"]["text/html"]
