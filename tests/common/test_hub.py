"""Without a network every command says so at once, in one sentence."""

import time

import pytest

from moe2dense.__main__ import main
from moe2dense.common import hub


@pytest.fixture
def no_network(monkeypatch):
    """The hub's address answers nobody."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.hub_unreachable.cache_clear()
    yield
    hub.hub_unreachable.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "no/model", "--to", "7b"], "TEACHER 'no/model' is on the hub, which cannot be reached"),
        (["plan", "mixtral", "--to", "no/model"], "--to no/model is no folder here, and the hub cannot be reached"),
        (["inspect", "mixtral", "--data", "x"], "mistralai/Mixtral-8x7B-v0.1 on the hub, which cannot be downloaded"),
        (["convert", "TINY", "--to", "3.2m", "--data", "no/data"], "data 'no/data' is no file or folder here, and"),
    ],
)
def test_one_sentence_and_no_retries(no_network, tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert main([str(tiny) if a == "TINY" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert time.monotonic() - started < 30 and not list(tmp_path.iterdir())


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("the network was used"))
    hub.hub_unreachable.cache_clear()
    assert hub.hub_unreachable() == ""
    hub.hub_unreachable.cache_clear()
