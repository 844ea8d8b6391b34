"""An export to an object store is the export to a folder, and never looks whole before it is."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe2dense.__main__ import main
from moe2dense.common.object_store import ObjectStore
from moe2dense.errors import UserError
from moe2dense.exporting.remote import check_room, export_folder
from tests.distillation.tiny_run import make_student

URL = "memory://models/mine"


pytestmark = pytest.mark.usefixtures("memory_store")


@pytest.fixture
def store():
    return ObjectStore(URL, "--out")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def export_to(url, overwrite=False, **files):
    with export_folder(url, overwrite) as folder:
        write(folder, **files)


def there(store):
    return {name: store.read(name).decode() for name in store.names()}


MODEL = {"config__json": "{}", "a__safetensors": "weights", "README__md": "card"}


def test_a_folder_is_the_folder_itself(tmp_path):
    with export_folder(tmp_path / "model") as folder:
        assert folder == tmp_path / "model"


def test_what_is_exported_lies_there(store):
    export_to(URL, **MODEL)
    assert there(store) == {"config.json": "{}", "a.safetensors": "weights", "README.md": "card"}


@pytest.mark.parametrize("model", [MODEL, {"mine__gguf": "weights", "README__md": "card"}])
def test_an_upload_that_is_cut_is_no_model(store, monkeypatch, model):
    """Whichever file it is that does not arrive."""
    put = ObjectStore.put
    for arrived in range(len(model)):
        left = [arrived]

        def cut(self, local, name, left=left):
            if not left[0]:
                raise UserError("the network is gone")
            left[0] -= 1
            put(self, local, name)

        monkeypatch.setattr(ObjectStore, "put", cut)
        with pytest.raises(UserError, match="the network is gone"):
            export_to(URL, overwrite=True, **model)
        assert len(store.names()) == arrived
        assert not any(name == "config.json" or name.endswith(".gguf") for name in store.names())
    monkeypatch.setattr(ObjectStore, "put", put)
    export_to(URL, overwrite=True, **model)
    assert len(store.names()) == len(model)


def test_a_model_that_is_replaced_leaves_no_weights_behind(store, monkeypatch):
    store.write("notes.txt", b"mine")
    with pytest.raises(UserError, match=f"--out {URL} holds files .notes.txt.; choose another URL, or add --overwrite"):
        export_to(URL, **MODEL)
    export_to(URL, overwrite=True, **MODEL, a__safetensors__index__json="{}", b__safetensors="more")
    export_to(URL, overwrite=True, config__json="{1}", a__safetensors="other")
    assert there(store) == {
        "config.json": "{1}", "a.safetensors": "other", "README.md": "card", "notes.txt": "mine",
    }  # fmt: skip

    def gone(*_):
        raise UserError("the network is gone")

    monkeypatch.setattr(ObjectStore, "put", gone)
    with pytest.raises(UserError):
        export_to(URL, overwrite=True, **MODEL)
    assert "config.json" not in store.names()


def test_an_error_of_the_export_uploads_nothing(store):
    with pytest.raises(ZeroDivisionError), export_folder(URL) as folder:
        write(folder, **MODEL)
        raise ZeroDivisionError
    assert store.names() == []


def test_a_temporary_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    check_room(URL, 1)
    check_room(tmp_path, 10**18)
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        check_room(URL, 10**18)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_student(vocab_size=4096).save_pretrained(folder)
    return folder


def test_the_command_exports_the_same_files_to_a_folder_and_to_a_url(checkpoint, tiny, tmp_path, capsys):
    options = ["--tokenizer", str(tiny), "--dtype", "float32"]
    url = f"file://{tmp_path}/store/mine"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "local" / "mine"), *options]) == 0
    assert main(["export", str(checkpoint), "--out", url, *options]) == 0
    assert f"{url}: " in capsys.readouterr().out.replace("\n", "")
    local, remote = ({p.name: p.read_bytes() for p in (tmp_path / k / "mine").iterdir()} for k in ("local", "store"))
    assert local == remote
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "store" / "mine")
    assert json.loads(remote["config.json"])["model_type"] == loaded.config.model_type
    assert load_file(tmp_path / "store/mine/model.safetensors").keys() == loaded.state_dict().keys()
    assert main(["export", str(checkpoint), "--out", url, *options]) == 2
    assert "holds files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "x", "--out", "nowhere://b/m"], "--out nowhere://b/m cannot be used (ValueError: Protocol not known"),
        (["export", "x", "--out", URL, "--push-to-hub", "me/m", "--yes"], "--push-to-hub uploads a folder of this machine"),
        (["distill", "x", "--out", URL, "--data", "d", "--teacher", "t"], "It is a URL; give a path of this machine."),
        (["generate", "x", "--out", URL, "--data", "d"], "It is a URL; give a path of this machine."),
        (["report", URL], "It is a URL; give a path of this machine."),
        (["convert", "mixtral", "--to", "7b", "--out", URL], f"--out {URL} is a URL, and a run needs a folder of this machine; add --mirror"),
    ],
)  # fmt: skip
def test_urls_are_refused_where_only_a_folder_is_understood(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
