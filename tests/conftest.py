"""Shared fixtures. Nothing here needs a network or a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from moe2dense.common import object_store
from tests.record_families import Recorder

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-families",
        action="store_true",
        help="write what the tests of families show to docs/families_seen.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-families"):
        config.pluginmanager.register(Recorder())


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Several workers share few cores."""
    torch.set_num_threads(1)


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave nothing in fsspec's `memory://` after a test, in which a request to an object store that failed is tried again at once."""
    monkeypatch.setattr(object_store, "WAIT", 0.0)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A real trained MoE: 4 layers, 8 experts top-2."""
    return ROOT / "examples" / "tiny-mixtral"


@pytest.fixture(scope="session")
def text() -> Path:
    """Public-domain passages by domain: train, valid, test, ood."""
    return ROOT / "examples" / "text"


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)
