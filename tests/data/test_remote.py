"""Text behind a URL is copied once and read as a local file is."""

import fsspec
import pytest

from moe2dense.data.load import load_blocks
from moe2dense.data.records import is_single_file, passages
from moe2dense.errors import UserError
from tests.data.test_load import jsonl, rows, tokenizer  # noqa: F401


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE2DENSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    """A folder on a store, as (its URL, a function that puts a file there)."""
    files = fsspec.filesystem(request.param)
    root = "/texts" if request.param == "memory" else str(tmp_path / "remote")
    files.makedirs(root, exist_ok=True)

    def put(name, local):
        files.put_file(str(local), f"{root}/{name}")

    yield f"{request.param}://{root}", put
    files.rm(root, recursive=True)


def test_a_url_is_read_as_the_file_is(tmp_path, tokenizer, store):  # noqa: F811
    url, put = store
    folder = tmp_path / "local"
    folder.mkdir()
    for name, start in (("train", 0), ("valid", 100)):
        put(f"{name}.jsonl", jsonl(folder / f"{name}.jsonl", rows(40, start)))
    assert not is_single_file(url) and is_single_file(f"{url}/train.jsonl")
    for split in ("train", "valid"):
        assert load_blocks(url, tokenizer, 16, split).keys() == load_blocks(folder, tokenizer, 16, split).keys()
    one = load_blocks(f"{url}/train.jsonl", tokenizer, 16, "valid", 16)
    assert one.keys() == load_blocks(folder / "train.jsonl", tokenizer, 16, "valid", 16).keys()
    whole = load_blocks(f"{url}/train.jsonl", tokenizer, 16, "all")
    assert whole.keys() == load_blocks(folder / "train.jsonl", tokenizer, 16, "all").keys()


def test_what_has_changed_is_copied_again_and_only_that(tmp_path, store, monkeypatch):
    url, put = store
    put("train.jsonl", jsonl(tmp_path / "a.jsonl", rows(5)))
    first = list(passages(url, "train", 0))
    copies = []
    monkeypatch.setattr("moe2dense.common.object_store.whole_file", lambda path: copies.append(path))
    assert list(passages(url, "train", 0)) == first and not copies
    monkeypatch.undo()
    monkeypatch.setenv("MOE2DENSE_CACHE", str(tmp_path / "cache"))
    put("train.jsonl", jsonl(tmp_path / "b.jsonl", rows(6, 50)))
    assert len(list(passages(url, "train", 0))) == 6


def test_what_is_not_there_is_said(store, tmp_path):
    url, put = store
    with pytest.raises(UserError, match=r"train.jsonl does not exist"):
        list(passages(f"{url}/train.jsonl", "train", 0))
    put("valid.jsonl", jsonl(tmp_path / "a.jsonl", rows(5)))
    with pytest.raises(UserError, match=r"has no train file \(found valid.jsonl\)"):
        list(passages(url, "train", 0))
    with pytest.raises(UserError, match=r"nowhere://x/train.jsonl cannot be read \(ValueError: Protocol not known"):
        list(passages("nowhere://x/train.jsonl", "train", 0))
