"""A mirror is whole at any moment: it is what its last manifest names, or it is refused by name."""

from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe2dense.common import mirror as mirroring
from moe2dense.common.mirror import RECORD, Mirror, fetch_mirror, newest_manifest, same_place
from moe2dense.common.object_store import ObjectStore
from moe2dense.errors import UserError


class Cut(MemoryFileSystem):
    """A store whose network goes away after so many writes; half of the write that fails arrives."""

    protocol = "cut"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 10**9

    def _count(self, path, data):
        if Cut.left <= 0:
            raise OSError("connection reset")
        Cut.left -= 1
        if not Cut.left:
            super().pipe_file(path, data[: len(data) // 2])
            raise OSError("connection reset")

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, "rb") as file:
            data = file.read()
        self._count(rpath, data)
        super().pipe_file(rpath, data)

    def pipe_file(self, path, value, **kwargs):
        self._count(path, value)
        super().pipe_file(path, value)


fsspec.register_implementation("cut", Cut, clobber=True)


pytestmark = pytest.mark.usefixtures("memory_store")


@pytest.fixture(params=["small", "large"])
def _sizes(request, monkeypatch):
    """Every file is a small one, read once, or a large one, copied as a file."""
    monkeypatch.setattr(mirroring, "_SMALL", 2**24 if request.param == "small" else -1)


both_sizes = pytest.mark.usefixtures("_sizes")


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    """An empty store, in memory and on disk."""
    root = "/mirror" if request.param == "memory" else str(tmp_path / "mirror")
    yield ObjectStore(f"{request.param}://{root}", "--mirror")
    files = fsspec.filesystem(request.param)
    if files.exists(root):
        files.rm(root, recursive=True)


@pytest.fixture
def cut():
    Cut.left = 10**9
    Cut.store.clear()
    yield ObjectStore("cut://run", "--mirror")
    Cut.left = 10**9


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fetched(store, folder):
    """What a reader gets: the files by name."""
    manifest = newest_manifest(store)
    assert manifest is not None
    fetch_mirror(store, manifest, folder)
    return {name: text for name, text in content(folder).items() if name != RECORD}


@both_sizes
def test_a_mirror_follows_changed_new_and_removed_files(store, tmp_path):
    run = tmp_path / "run"
    write(run, a="one", deep__er__b="two", same="two", empty="")
    mirror = Mirror(store, run)
    for change in (
        {},
        {"a": "ONE"},
        {"new": "three"},
    ):
        write(run, **change)
        mirror.update()
        expected = {name: text for name, text in content(run).items() if name != RECORD}
        assert fetched(store, tmp_path / "copy") == expected
        assert len(store.names("objects")) == len(set(expected.values()))  # equal content once, and nothing of before
        assert sum(name.startswith("manifest") for name in store.names()) == 1
    (run / "deep" / "er" / "b").unlink()
    mirror.update()
    assert fetched(store, tmp_path / "copy").keys() == {"a", "same", "empty", "new"}


def test_hidden_files_and_what_is_left_out_stay_here(store, tmp_path):
    write(tmp_path / "run", a="one", **{".lock": "", ".step-2.partial-7-x__weights": "half"})
    write(tmp_path / "run", **{"targets__window-3__shard": "big", "rollouts__window-3": "small"})
    Mirror(store, tmp_path / "run", leave_out="window-*").update()
    assert fetched(store, tmp_path / "copy") == {"a": "one", "rollouts/window-3": "small"}


@both_sizes
def test_nothing_is_written_where_nothing_has_changed(store, tmp_path, monkeypatch):
    write(tmp_path / "run", a="one")
    mirror = Mirror(store, tmp_path / "run")
    mirror.update()
    before = store.names()
    monkeypatch.setattr(store, "put", lambda *_: pytest.fail("copied again"))
    monkeypatch.setattr(store, "write", lambda *_: pytest.fail("written again"))
    mirror.update()
    again = Mirror(store, tmp_path / "run")  # as a resumed run does
    again.update()
    assert store.names() == before


@both_sizes
@pytest.mark.parametrize("writes", range(1, 5))
def test_a_copy_cut_anywhere_leaves_the_state_before_it(cut, tmp_path, writes):
    run = tmp_path / "run"
    write(run, a="one", b="two", c="three")
    mirror = Mirror(cut, run)
    mirror.update()
    write(run, a="another one", b="another two", d="four")
    (run / "c").unlink()
    Cut.left = writes  # three objects and the manifest; the last that is let through arrives by half
    with pytest.raises(UserError, match=r"--mirror cut://run cannot be used after 4 tries \(OSError: connection reset"):
        mirror.update()
    assert fetched(cut, tmp_path / "copy") == {"a": "one", "b": "two", "c": "three"}
    Cut.left = 10**9
    mirror.update()
    assert fetched(cut, tmp_path / "copy") == {"a": "another one", "b": "another two", "d": "four"}


def test_a_run_that_was_killed_while_it_copied_goes_on(cut, tmp_path):
    run = tmp_path / "run"
    write(run, a="one")
    Mirror(cut, run).update()
    write(run, a="another one", b="two")
    Cut.left = 2
    with pytest.raises(UserError):
        Mirror(cut, run).update()
    Cut.left = 10**9
    Mirror(cut, run).update()
    assert fetched(cut, tmp_path / "copy") == {"a": "another one", "b": "two"}
    assert len(cut.names("objects")) == 2


@pytest.mark.parametrize("method", ["put_file", "pipe_file"])
def test_a_short_failure_is_tried_again(cut, tmp_path, monkeypatch, method):
    write(tmp_path / "run", a="one")
    monkeypatch.setattr(mirroring, "_SMALL", 0)
    failures = [OSError("reset"), OSError("reset")]
    put = getattr(Cut, method)

    def flaky(self, *args, **kwargs):
        if failures:
            raise failures.pop()
        put(self, *args, **kwargs)

    monkeypatch.setattr(Cut, method, flaky)
    Mirror(cut, tmp_path / "run").update()
    assert not failures and fetched(cut, tmp_path / "copy") == {"a": "one"}


def test_a_file_that_arrives_by_half_is_sent_again(cut, tmp_path, monkeypatch):
    write(tmp_path / "run", a="one", b="two")
    monkeypatch.setattr(mirroring, "_SMALL", 0)
    put, halves = Cut.put_file, [1]

    def silent(self, lpath, rpath, **kwargs):
        if halves:
            MemoryFileSystem.pipe_file(self, rpath, b"o" * halves.pop())
        else:
            put(self, lpath, rpath)

    monkeypatch.setattr(Cut, "put_file", silent)
    Mirror(cut, tmp_path / "run").update()
    assert fetched(cut, tmp_path / "copy") == {"a": "one", "b": "two"}


@both_sizes
def test_what_is_written_to_or_removed_meanwhile_is_stored_as_it_was_once(store, tmp_path, monkeypatch):
    """As metrics.jsonl, to which training appends, and a window of targets that it drops."""
    run = tmp_path / "run"
    write(run, log="1\n", a_window="old", other="same")
    mirror, send = Mirror(store, run), {name: getattr(store, name) for name in ("put", "write")}
    steps = iter(range(2, 4))

    def meanwhile(name, first, *rest):
        if (step := next(steps, None)) is not None:
            with open(run / "log", "a") as file:
                file.write(f"{step}\n")
            (run / "a_window").unlink(missing_ok=True)
        send[name](first, *rest)

    for name in send:
        monkeypatch.setattr(store, name, lambda *a, name=name: meanwhile(name, *a))
    mirror.update()
    copy = fetched(store, tmp_path / "copy")
    assert copy["log"] == "1\n2\n3\n"[: len(copy["log"])] and copy["log"].endswith("\n") and copy["other"] == "same"
    assert copy.get("a_window", "old") == "old"
    mirror.update()
    assert fetched(store, tmp_path / "copy") == {"log": "1\n2\n3\n", "other": "same"}
    assert len(store.names("objects")) == 2


def test_a_large_file_that_never_rests_is_named(store, tmp_path, monkeypatch):
    write(tmp_path / "run", a="one")
    monkeypatch.setattr(mirroring, "_SMALL", 0)
    put = store.put

    def touch(path, name):
        put(path, name)
        path.write_text(path.read_text() + "+")

    monkeypatch.setattr(store, "put", touch)
    with pytest.raises(UserError, match=r"run/a changes while it is copied to --mirror"):
        Mirror(store, tmp_path / "run").update()


@pytest.mark.parametrize("damage", [b"onE", b"on", None])
def test_a_damaged_object_is_refused_by_name_and_the_folder_stays(store, tmp_path, damage):
    write(tmp_path / "run", deep__a="one")
    Mirror(store, tmp_path / "run").update()
    write(tmp_path / "copy", mine="as it was")
    (name,) = store.names("objects")
    store.remove(name)
    if damage is not None:
        store.write(name, damage)
    with pytest.raises(UserError, match=name):
        fetched(store, tmp_path / "copy")
    assert content(tmp_path / "copy") == {"mine": "as it was"}


def test_a_damaged_manifest_is_not_believed(store, tmp_path):
    write(tmp_path / "run", a="one")
    Mirror(store, tmp_path / "run").update()
    (name,) = [n for n in store.names() if n.startswith("manifest")]
    store.write(name, store.read(name)[:-5])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        newest_manifest(store)


def test_two_runs_do_not_share_a_mirror(store, tmp_path):
    for name in ("run", "other"):
        write(tmp_path / name, a=name)
    first = Mirror(store, tmp_path / "run")
    first.update()
    with pytest.raises(UserError, match="holds another run"):
        Mirror(store, tmp_path / "other")
    fetched(store, tmp_path / "copy")
    second = Mirror(store, tmp_path / "copy")
    write(tmp_path / "copy", a="further")
    second.update()
    write(tmp_path / "run", a="further too")
    with pytest.raises(UserError, match="is newer than .*run: the run went on elsewhere"):
        first.update()
    assert fetched(store, tmp_path / "third") == {"a": "further"}


def test_names_that_leave_the_folder_are_refused(store, tmp_path):
    write(tmp_path / "run", a="one")
    Mirror(store, tmp_path / "run").update()
    manifest = newest_manifest(store)
    manifest.files["../../a"] = manifest.files["a"]
    (name,) = [n for n in store.names() if n.startswith("manifest")]
    store.remove(name)
    store.write(manifest.name, manifest.to_bytes())
    with pytest.raises(UserError, match=r"it names '../../a'"):
        newest_manifest(store)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x/run", r"--mirror nowhere://x/run cannot be used \(ValueError: Protocol not known: nowhere\)"),
        ("out/run", "--mirror out/run is no URL"),
        ("file:///proc/nothing/run", "--mirror file:///proc/nothing/run cannot be used .*check the URL"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_sentence(url, message):
    with pytest.raises(UserError, match=message):
        ObjectStore(url, "--mirror").probe()


def test_a_missing_package_is_named():
    fsspec.register_implementation("lost", "not_there.at.all", clobber=True, errtxt="Install lostfs to access lost")
    with pytest.raises(UserError, match=r"--mirror lost://x/run: a package is missing \(Install lostfs"):
        ObjectStore("lost://x/run", "--mirror")


def test_a_store_without_the_right_to_write_is_refused(cut, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no credentials")

    monkeypatch.setattr(Cut, "pipe_file", refuse)
    with pytest.raises(UserError, match="PermissionError: no credentials"):
        cut.probe()


def test_a_probe_leaves_nothing(store):
    store.probe()
    assert store.names() == []


def test_places_inside_each_other(tmp_path):
    inside = ObjectStore(f"file://{tmp_path}/run/mirror", "--mirror")
    assert same_place(inside, tmp_path / "run") and same_place(inside, tmp_path / "run" / "mirror" / "a")
    assert not same_place(inside, tmp_path / "run2") and not same_place(ObjectStore("memory://a", "--mirror"), tmp_path)
