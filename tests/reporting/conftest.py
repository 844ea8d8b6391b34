import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def made_up_report():
    """The generator of made-up reports that the rendering benchmark uses: (layers, experts) -> report."""
    path = Path(__file__).parents[2] / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("benchmark_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.made_up_report
