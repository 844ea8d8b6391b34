"""A store of targets below a URL is the store in a folder, however it was interrupted and however little of it is copied here."""

import shutil

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from moe2dense.__main__ import main
from moe2dense.common.object_store import ObjectStore
from moe2dense.data.remote import cache_folder
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.store import open_targets, read_manifest
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.weights.remote import RemoteTensors
from tests.distillation.targets.test_store import make_blocks, make_teacher
from tests.distillation.tiny_run import make_student, same, settings, weights

URL = "memory://stores/one"


pytestmark = pytest.mark.usefixtures("memory_store")


@pytest.fixture(autouse=True)
def _small_and_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE2DENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moe2dense.distillation.targets.remote._SPARE", 0)
    monkeypatch.setattr("moe2dense.distillation.targets.write._RESIDENT_BLOCKS", 4)


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture
def store():
    return ObjectStore(URL, "targets")


def copies():
    return sorted((cache_folder() / "targets").glob("*/shard-*.safetensors"))


def equal_rows(one, other, picks=([9, 1], [0], [10, 5, 4])):
    """Compare every bit that a loss reads."""
    for picked in picks:
        ours, expected = (vars(s.batch(picked)) for s in (one, other))
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("format", TARGET_FORMATS)
def test_what_is_written_to_a_url_is_what_is_written_to_a_folder(teacher, tmp_path, store, format):
    blocks = make_blocks(11)
    write_targets(teacher, blocks, tmp_path / "local", format)
    for url in (URL, f"file://{tmp_path}/remote"):
        assert write_targets(teacher, blocks, url, format) == url
        remote = ObjectStore(url, "targets")
        assert {n: remote.read(n) for n in remote.names()} == {
            p.name: p.read_bytes() for p in (tmp_path / "local").iterdir() if p.name != ".lock"
        }


@pytest.mark.parametrize("format", TARGET_FORMATS)
@pytest.mark.parametrize("room", [None, "one", 0])
def test_what_is_read_is_what_is_read_of_a_folder(teacher, tmp_path, format, room):
    """Whether all shards, one, or none may be copied here."""
    blocks = make_blocks(11)
    local = open_targets(write_targets(teacher, blocks, tmp_path / "local", format), blocks)
    write_targets(teacher, blocks, URL, format)
    size = max(p.stat().st_size for p in (tmp_path / "local").glob("shard-*"))
    remote = open_targets(URL, blocks, room=size if room == "one" else room)
    equal_rows(remote, local)
    assert remote.identity == local.identity
    assert len(copies()) == {None: 3, "one": 1, 0: 0}[room]
    if room == "one":
        assert sum(p.stat().st_size for p in copies()) <= size


def test_shards_are_copied_when_they_are_first_needed_and_removed_when_room_is_less(teacher, tmp_path):
    blocks = make_blocks(11)
    local = open_targets(write_targets(teacher, blocks, tmp_path / "local"), blocks)
    write_targets(teacher, blocks, URL)
    remote = open_targets(URL, blocks)
    assert copies() == []
    remote.batch([5])
    assert len(copies()) == 1
    equal_rows(remote, local)
    assert len(copies()) == 3
    smaller = open_targets(URL, blocks, room=copies()[0].stat().st_size)
    assert len(copies()) <= 1
    equal_rows(smaller, local)
    assert len(copies()) <= 1
    equal_rows(remote, local)  # an open copy that was removed can still be read


def test_a_disk_without_room_is_not_filled(teacher, tmp_path, monkeypatch):
    blocks = make_blocks(11)
    local = open_targets(write_targets(teacher, blocks, tmp_path / "local"), blocks)
    write_targets(teacher, blocks, URL)
    monkeypatch.setattr("moe2dense.distillation.targets.remote._SPARE", 2**60)
    equal_rows(open_targets(URL, blocks), local)
    assert copies() == []


def test_targets_that_were_written_again_are_read_again(teacher):
    blocks, picked = make_blocks(11), [0, 7]
    first = open_targets(write_targets(teacher, blocks, URL), blocks).batch(picked).hidden
    fsspec.filesystem("memory").rm("/stores", recursive=True)
    write_targets(make_teacher(4), blocks, URL)
    again = open_targets(URL, blocks).batch(picked)
    assert not torch.equal(first, again.hidden)
    assert torch.equal(again.head.weight, make_teacher(4).lm_head.weight)


def test_a_damaged_or_missing_shard_is_named(teacher, store):
    blocks = make_blocks(11)
    write_targets(teacher, blocks, URL)
    name = "shard-0000004.safetensors"
    data = bytearray(store.read(name))
    data[-5] ^= 1
    store.write(name, bytes(data))
    with pytest.raises(UserError, match=rf"{URL}/{name} are damaged"):
        open_targets(URL, blocks).batch([5])
    assert copies() == []
    store.remove(name)
    with pytest.raises(UserError, match=rf"{URL}/{name} is missing"):
        open_targets(URL, blocks).batch([5])
    with pytest.raises(UserError, match=f"targets {URL}/none is no store"):
        open_targets(f"{URL}/none", blocks)
    with pytest.raises(UserError, match="targets nowhere://a/b cannot be used"):
        open_targets("nowhere://a/b", blocks)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_writing_that_is_cut_anywhere_goes_on(teacher, tmp_path, monkeypatch, kind):
    """At each request in turn, whose file arrives by half. What is listed is whole, and the end is that of writing in one go."""
    blocks = make_blocks(11)
    write_targets(teacher, blocks, tmp_path / "local")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir() if p.name != ".lock"}
    write, requests = ObjectStore.write, 0
    for failing in range(100):
        url, count = f"{URL}/{failing}" if kind == "memory" else f"file://{tmp_path}/remote/{failing}", iter(range(100))

        def cut(self, name, data, failing=failing, count=count):
            if next(count) == failing:
                write(self, name, data[: len(data) // 2])
                raise UserError("the network is gone")
            write(self, name, data)

        monkeypatch.setattr(ObjectStore, "write", cut)
        try:
            write_targets(teacher, blocks, url)
            break
        except UserError as error:
            assert "the network is gone" in str(error)
        monkeypatch.setattr(ObjectStore, "write", write)
        store, requests = ObjectStore(url, "targets"), requests + 1
        if "store.json" in store.names():
            assert all(store.read(s["file"]) == expected[s["file"]] for s in read_manifest(url)["shards"])
        write_targets(teacher, blocks, url)
        assert {name: store.read(name) for name in store.names() if not name.endswith(".partial")} == expected
    assert requests == 9  # keys, head, list; three shards, each followed by the list


def test_another_store_and_other_files_are_left_alone(teacher, store):
    write_targets(teacher, make_blocks(5), URL)
    with pytest.raises(UserError, match=f"{URL} holds targets of another text or tokenizer"):
        write_targets(teacher, make_blocks(5, seed=3), URL)
    other = ObjectStore(f"{URL}/model", "targets")
    other.write("config.json", b"{}")
    with pytest.raises(UserError, match=rf"{URL}/model holds other files \(config.json\)"):
        write_targets(teacher, make_blocks(5), f"{URL}/model")


def test_processes_on_several_machines_are_refused(teacher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="processes on several machines cannot write one store to a URL"):
        write_targets(teacher, make_blocks(5), URL)


def test_rows_of_a_remote_file_are_those_that_safetensors_reads(tmp_path, store):
    generator = torch.Generator().manual_seed(int(torch.randint(10**6, ())))
    tensors = {
        str(dtype): (torch.rand(5, 3, 7, generator=generator) * 100).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.uint16)
    } | {"offsets": torch.arange(6), "none": torch.empty(0, 4)}
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    store.put(tmp_path / "a.safetensors", "a.safetensors")
    here, there = safe_open(tmp_path / "a.safetensors", "pt"), RemoteTensors(store, "a.safetensors")
    for name, value in tensors.items():
        for rows in (slice(1, 3), slice(0, 5), slice(2, 2), *range(min(5, len(value)))):
            expected, ours = here.get_slice(name)[rows], there.get_slice(name)[rows]
            assert ours.dtype == expected.dtype and ours.shape == expected.shape and torch.equal(ours, expected)
    store.write("b.safetensors", b"\xff" * 100)
    with pytest.raises(UserError, match=r"b\.safetensors is damaged"):
        RemoteTensors(store, "b.safetensors")


def test_training_on_targets_at_a_url_is_training_on_the_folder(tmp_path):
    """Bit for bit, with copies of one shard and nothing of the others here."""
    from tests.distillation.tiny_run import make_blocks as text
    from tests.distillation.tiny_run import make_teacher as teacher

    trained = []
    for place, room in ((tmp_path / "local", None), (URL, 6000)):
        student, blocks = make_student(), text()
        targets = open_targets(write_targets(teacher(), blocks, place), blocks, room=room)
        distill(student, data=blocks, targets=targets, config=settings(epochs=2.0), seed=3)
        trained.append(weights(student))
    assert same(*trained) and 0 < len(copies()) < 6


def test_the_commands_write_read_and_refuse(tiny, text, tmp_path, monkeypatch, capsys):
    make_student(vocab_size=4096, max_position_embeddings=64).save_pretrained(tmp_path / "student")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "student")
    options = ["--data", str(text), "--tokens", "1536", "--block", "64"]
    said = []
    for name, place in (("local", str(tmp_path / "store")), ("remote", URL)):
        capsys.readouterr()
        assert main(["targets", str(tiny), *options, "--out", place]) == 0
        said.append(" ".join(capsys.readouterr().out.split()).replace(place, "PLACE"))
        train = ["distill", str(tmp_path / "student"), *options, "--targets", place, "--out", str(tmp_path / name)]
        assert main([*train, *(["--targets-disk", "0"] if name == "remote" else [])]) == 0
    assert "hidden targets of 1536 tokens" in said[0] and said[0] == said[1]
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("local", "remote")]
    assert files[0] == files[1] and copies() == []
    capsys.readouterr()
    config = tmp_path / "run.toml"
    config.write_text(f'[train]\ntargets = "{URL}/none"\n')
    for arguments, message in (
        (["targets", "x", *options, "--out", "nowhere://a"], "targets nowhere://a cannot be used"),
        (["distill", "x", *options, "--targets", f"{URL}/none", "--out", "o"], "is no store"),
        (["distill", "x", *options, "--targets", "y", "--targets-disk", "1GB", "--out", "o"], "or for --targets at a URL"),
        (["convert", str(tiny), "--to", "3.2m", "--config", str(config), "--out", str(tmp_path / "c")], "is no store"),
    ):  # fmt: skip
        assert main(arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c").exists()
