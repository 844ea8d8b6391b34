"""The weights of a model on the hub are downloaded once, in the form that is read here."""

import json

import pytest
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from moe2dense.families import download

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
COPIES = [
    "original/model.safetensors", "original/config.json", "consolidated.safetensors", "pytorch_model.bin",
    "onnx/model.onnx", "metal/model.bin", "figures/loss.png", "README.md",
]  # fmt: skip


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Return what is fetched of a listing, with the hub client's own rules for patterns."""

    def fetch(listing: list[str], index: dict[str, str] | None) -> list[str]:
        def one_file(hub_id, name, local_files_only):
            if index is None:
                raise EntryNotFoundError(name)
            (tmp_path / name).write_text(json.dumps({"weight_map": index}))
            return str(tmp_path / name)

        chosen: list[str] = []

        def snapshot(hub_id, allow_patterns, ignore_patterns, local_files_only):
            chosen.extend(filter_repo_objects(listing, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            return str(tmp_path)

        monkeypatch.setattr(download, "hf_hub_download", one_file)
        monkeypatch.setattr(download, "snapshot_download", snapshot)
        assert download.download_model("owner/name") == tmp_path
        return chosen

    return fetch


def test_shards_are_those_that_the_index_names(fetched):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    listing = [*SMALL, *COPIES, *shards, "model.safetensors.index.json"]
    chosen = fetched(listing, {"a": shards[0], "b": shards[1], "c": shards[1]})
    assert sorted(chosen) == sorted([*SMALL, *shards, "model.safetensors.index.json"])


def test_a_single_file_needs_no_index(fetched):
    assert sorted(fetched([*SMALL, *COPIES, "model.safetensors"], None)) == sorted([*SMALL, "model.safetensors"])


def test_a_single_file_goes_before_an_index(fetched, monkeypatch):
    """As in transformers: where a repository has both, the single file is the model."""
    monkeypatch.setattr(download, "is_on_hub", lambda hub_id, name: name == "model.safetensors")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    chosen = fetched([*SMALL, *shards, index, "model.safetensors"], {"a": shards[0], "b": shards[1]})
    assert sorted(chosen) == sorted([*SMALL, index, "model.safetensors"])


def test_shards_in_a_folder_are_fetched_where_the_index_names_them(fetched):
    chosen = fetched(
        [*SMALL, "weights/part-1.safetensors", "original/part-1.safetensors"], {"a": "weights/part-1.safetensors"}
    )
    assert "weights/part-1.safetensors" in chosen and "original/part-1.safetensors" not in chosen
