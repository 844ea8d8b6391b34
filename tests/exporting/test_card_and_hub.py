"""The model card's content, and errors of publishing."""

import importlib

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.exporting.hub import push_to_hub
from tests.exporting.conftest import tiny

httpx = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])  # the hub library's HTTP client

INFO = {
    "teacher": "mistralai/Mixtral-8x7B-v0.1", "license": "apache-2.0", "datasets": ["allenai/c4", "my text"],
    "target": "7b", "method": "layerwise", "tokens": 1_234_567, "seed": 3, "tokens_judged": 4321, "transferred": 0.873,
    "lost": ["Furthest from the teacher on: law (0.300 nats/token)."], "tags": ["mine"], "languages": ["en"],
    "command": "moe2dense convert mixtral --to 7b", "config": 'seed = 3\n[train]\nlr = 0.001\n',
    "rows": [
        {"name": "student", "scores": {"kl": {"value": 0.1064, "low": 0.0991, "high": 0.114}, "teacher_nll": 3.618,
                                       "nll": {"value": 3.722, "low": None, "high": None}, "agreement": 0.8}},
        {"name": "before training", "scores": {"kl": 0.21, "nll": float("nan")}},
    ],
}  # fmt: skip


def test_the_card_says_everything_and_its_metadata_parse(tmp_path):
    export(tiny("mistral"), tmp_path / "small", info=INFO)
    card = ModelCard.load(tmp_path / "small/README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "mistralai/Mixtral-8x7B-v0.1" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["allenai/c4"] and data["library_name"] == "transformers" and data["language"] == ["en"]
    assert {"moe2dense", "dense", "mine"} <= set(data["tags"]) and data["pipeline_tag"] == "text-generation"
    for text in (
        "# small", "1,234,567 tokens", "`my text`", "`layerwise`", "4,321 held-out tokens",
        "| teacher | 0 | 3.62 | 1 |", "| student | 0.106 [0.0991, 0.114] | 3.72 | 0.8 |", "| before training | 0.21 | – | – |",
        "87%", "Furthest from the teacher on: law", "moe2dense convert mixtral --to 7b", "lr = 0.001", "vllm serve small",
        "| transformers | yes, this architecture is tested there |", "| vllm | yes, this architecture is tested there |",
        "torch ", "transformers ", "bfloat16",
    ):  # fmt: skip
        assert text in card.text, text


def test_a_card_without_facts_claims_none(tmp_path):
    export(tiny("mistral"), tmp_path / "m", info={"teacher": str(tmp_path)})
    card = ModelCard.load(tmp_path / "m/README.md")
    assert (
        "Not measured." in card.text
        and "base_model" not in card.data.to_dict()
        and "license" not in card.data.to_dict()
    )
    assert "None" not in card.text


@pytest.fixture
def folder(tmp_path):
    export(tiny("mistral"), tmp_path / "m")
    return tmp_path / "m"


def test_push_is_private_by_default_and_asks(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **k: calls.append((repo, k)) or f"https://hub/{repo}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: calls.append(k))
    asked = []
    assert push_to_hub(folder, "me/m", confirm=lambda q: not asked.append(q)) == "https://hub/me/m"
    assert calls[0] == ("me/m", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert calls[1]["folder_path"] == folder and "private repository me/m" in asked[0]
    calls.clear()
    with pytest.raises(UserError, match="not confirmed"):
        push_to_hub(folder, "me/m", confirm=lambda q: False)
    assert calls == []


def refusing(error):
    def create(self, repo, **options):
        raise error

    return create


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (httpx.ConnectError("name resolution failed"), "cannot be reached .name resolution failed."),
        (
            HfHubHTTPError("no", response=httpx.Response(403, request=httpx.Request("POST", "https://hub"))),
            r"refused me/m \(403\); check the token's rights",
        ),
    ],
)
def test_hub_errors_are_one_sentence(folder, error, message, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", refusing(error))
    with pytest.raises(UserError, match=message):
        push_to_hub(folder, "me/m")


def test_what_is_no_export_or_no_id_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is not an exported checkpoint"):
        push_to_hub(tmp_path / "nothing", "me/m")
    with pytest.raises(UserError, match="is not a valid repository id"):
        push_to_hub(folder, "me/m/../x")


def test_really_offline(folder, monkeypatch):
    # the address is one that nothing listens on
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    real = HfApi.__init__
    monkeypatch.setattr(HfApi, "__init__", lambda self, **k: real(self, endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(UserError, match="the hub cannot be reached"):
        push_to_hub(folder, "me/m")
