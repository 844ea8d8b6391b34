"""The model card's content, and errors of publishing."""

import importlib

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.exporting.card_info import card_info
from moe2dense.exporting.hub import push_to_hub
from moe2dense.exporting.model_card import add_sentence, model_card
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


def test_what_was_seen_elsewhere_joins_the_card_where_loading_is_told(tmp_path):
    export(tiny("mistral"), tmp_path / "m")
    before = (tmp_path / "m/README.md").read_text()
    add_sentence(tmp_path / "m", "Seen in vllm 0.32.0: KL 1e-6 | the same <b>.")
    after = (tmp_path / "m/README.md").read_text()
    sentence = "Seen in vllm 0.32.0: KL 1e-6 \\| the same &lt;b&gt;."
    assert after == before.replace("## How to load it\n\n", f"## How to load it\n\n{sentence}\n\n") != before


def test_the_card_repeats_the_reports_numbers():
    """Of the report's rows and costs nothing is rounded away, and nothing else is claimed."""
    scores = {"kl": {"value": 0.081, "low": 0.07, "high": 0.09}, "nll": {"value": 3.8, "low": 3.7, "high": 3.9}, "teacher_nll": 3.72,
              "agreement": {"value": 0.82, "low": 0.8, "high": 0.84}, "by_domain": {}, "tokens": 12288}  # fmt: skip
    report = {
        "run": {"plan": {"source": "examples/tiny"}, "config": {"to": "3.2m", "train": {"epochs": 2.0}, "seed": 7}, "data": {}, "command": "c",
                "versions": {"torch": "2"}},
        "student": {"architecture": "MistralForCausalLM", "method": "obs"}, "teacher": {"name": "tiny"}, "cost": {"tokens": 200_000},
        "rows": {"student": scores}, "transfer": {"model": {"transferred": 0.83}},
    }  # fmt: skip
    card = model_card("m", card_info(report), dtype="bfloat16", parameters=3_200_000)
    assert "| student | 0.081 [0.07, 0.09] | 3.8 [3.7, 3.9] | 0.82 [0.8, 0.84] |" in card
    assert "| teacher | 0 | 3.72 | 1 |" in card and "12,288 held-out tokens" in card and "200,000 tokens" in card
    assert "cover 83% of what single experts compute" in card and "Seed 7." in card and "before training" not in card


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
