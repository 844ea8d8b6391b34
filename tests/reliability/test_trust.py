"""What docs/security.md promises of files and answers that come from elsewhere."""

import ast
import http.server
import json
import pickle
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moe2dense.__main__ import main
from moe2dense.data.chat.conversation import Conversation
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.data.counts import Unusable
from moe2dense.errors import UserError
from moe2dense.exporting.model_card import model_card
from moe2dense.exporting.tokenizer import copy_files, load_tokenizer
from moe2dense.families.resolve import resolve_teacher
from moe2dense.generation import endpoint as endpoints
from moe2dense.generation.endpoint import Endpoint, collect
from moe2dense.generation.prompts import Prompt
from moe2dense.modeling.load import load_model
from moe2dense.reporting.html import render_page
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint, read_header
from moe2dense.weights.files import weight_files

PACKAGE = Path(__file__).parents[2] / "moe2dense"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def small_config(**values) -> MixtralConfig:
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 2, "vocab_size": 40, "max_position_embeddings": 32, "rope_theta": 777.0, "rms_norm_eps": 3e-6,
    }  # fmt: skip
    return MixtralConfig(**{**sizes, **values})


@pytest.fixture
def folder(tmp_path):
    """A small random teacher."""
    MixtralForCausalLM(small_config()).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def calls(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


# --- pickles


def test_no_module_can_unpickle_or_run_text():
    """No pickle, no torch.load, no eval: not in one module of the package. The script that runs a task's programs is no module."""
    script = PACKAGE / "evaluation" / "sandbox_child.py"
    assert not any(
        "sandbox_child" in ast.unparse(node)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                roots = {name.split(".")[0] for name in names}
                assert not roots & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}, path
        for call in calls(tree):
            text = ast.unparse(call.func)
            runs_text = text in ("eval", "exec", "compile", "__import__", "os.system")
            assert not runs_text or (path == script and text in ("exec", "compile")), (path, text)
            assert not text.endswith(("torch.load", "pickle.load", "np.load", "numpy.load")), (path, text)
            assert not any(k.arg in ("allow_pickle", "shell") for k in call.keywords), (path, text)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_not_opened(tmp_path, name, capsys):
    marker, source = tmp_path / "ran", tmp_path / "teacher"
    source.mkdir()
    small_config().save_pretrained(source)
    (source / name).write_bytes(pickle.dumps(Trap(marker)))
    for load in (Checkpoint, load_model):
        with pytest.raises(UserError, match="pickled weights"):
            load(source)
    assert main(["plan", str(source), "--to", "75%", "--speed", "1t", "--disk-speed", "1GB"]) == 2
    assert not marker.exists()


def test_a_pickle_beside_sound_weights_is_not_opened(folder, tmp_path):
    marker = tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    assert load_model(folder).config.model_type == "mixtral"
    assert Checkpoint(folder).tensors
    assert not marker.exists()


# --- code in a checkpoint


def test_every_loader_refuses_a_checkpoints_own_code():
    """Each call of from_pretrained for a config, model or tokenizer says trust_remote_code=False."""
    found = 0
    for path, tree in TREES.items():
        for call in calls(tree):
            text = ast.unparse(call.func)
            if text.startswith("Auto") and text.endswith(".from_pretrained"):
                values = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert values.get("trust_remote_code") == "False", (path, call.lineno)
                found += 1
    assert found >= 8


def with_code(folder: Path, marker: Path) -> None:
    """Let config.json and tokenizer_config.json name classes of a module in the folder, which writes `marker` when imported."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n")
    classes = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        table = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**table, "auto_map": classes}))


def test_auto_map_is_not_followed(folder, tmp_path, tiny):
    marker = tmp_path / "ran"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    with_code(folder, marker)
    assert resolve_teacher(str(folder)).config.model_type == "mixtral"
    assert type(load_model(folder)).__module__.startswith("transformers.")
    assert type(load_tokenizer(str(folder))).__module__.startswith("transformers.")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(UserError):
        resolve_teacher(str(folder))
    with pytest.raises(UserError):
        load_model(folder)
    assert not marker.exists()


# --- offsets and places


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}, "needs 8 bytes"),
        ({"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}, "truncated"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "needs 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [10**30, 10**30 + 8]}, "truncated"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "damaged"),
        ({"dtype": "F32", "shape": "2", "data_offsets": "08"}, "damaged"),
    ],
)
def test_offsets_outside_the_file_are_refused(tmp_path, entry, words):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(UserError, match=words):
        read_header(path)


def test_tensors_that_overlap_are_refused(tmp_path):
    entries = {
        n: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for n, start in (("a", 0), ("b", 4))
    }
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(UserError, match="overlap"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors"])
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
    source = tmp_path / "teacher"
    source.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside the folder"):
        weight_files(source)


def test_links_that_leave_the_folder_are_refused(tmp_path):
    source, secret = tmp_path / "teacher", tmp_path / "secret.json"
    source.mkdir()
    save_file({"a": torch.zeros(2)}, source / "model.safetensors")
    secret.write_text("key")
    (source / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(UserError, match="tokenizer_config.json is a link that leads out of the folder"):
        weight_files(source)
    with pytest.raises(UserError, match="leads out of the folder"):
        copy_files(source, tmp_path / "export", ("*.json",))
    assert not (tmp_path / "export").exists()
    (source / "tokenizer_config.json").unlink()
    (source / "loop").symlink_to(source / "loop")
    with pytest.raises(UserError, match="loop is a link"):
        weight_files(source)


def test_shards_may_lie_on_another_disk_and_it_is_said(folder, tmp_path):
    other = tmp_path / "other-disk" / "shard"
    other.parent.mkdir()
    (folder / "model.safetensors").rename(other)
    (folder / "model.safetensors").symlink_to(other)
    assert Checkpoint(folder).tensors
    with pytest.warns(
        UserWarning, match=r"model.safetensors is a link to weights elsewhere \(.*other-disk/shard\), which are read"
    ):
        load_teacher(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is not a safetensors file"):
        Checkpoint(folder)
    other.unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other)  # a disk that is not mounted
    with pytest.raises(UserError, match="model.safetensors is a link that leads out of the folder"):
        Checkpoint(folder)


def test_links_within_the_folder_and_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, blobs / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert weight_files(snapshot).files == (snapshot / "model.safetensors",)
    (snapshot / "again.safetensors").symlink_to("model.safetensors")
    (tmp_path / "elsewhere").symlink_to(snapshot)  # the folder itself may be a link
    assert weight_files(tmp_path / "elsewhere").files
    (snapshot / "config.json").symlink_to("../../../other")
    with pytest.raises(UserError, match="leads out"):
        weight_files(snapshot)


# --- programs in tokenizers and templates


@pytest.mark.parametrize(
    "program",
    [
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ strftime_now.__globals__['os'].system('true') }}",
    ],
)
def test_a_chat_template_reaches_nothing_but_its_conversation(tiny, program):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + program
    with pytest.raises(Unusable, match="chat template refuses it") as error:
        ChatTemplate(tokenizer).render(Conversation([{"role": "user", "content": "Hello"}]))
    assert "\n" not in str(error.value)


# --- markup in names and texts


def evil_everywhere(value):
    """Put markup into every text of a report; keys that are the user's (domains) too."""
    if isinstance(value, dict):
        return {k: evil_everywhere(v) for k, v in value.items()}
    if isinstance(value, list):
        return [evil_everywhere(v) for v in value]
    return value + EVIL if isinstance(value, str) and len(value) > 12 else value


def test_the_report_escapes_names_domains_and_texts(monkeypatch, root):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.delitem(__import__("sys").modules, "report", raising=False)
    from report import made_up_report

    report = json.loads(json.dumps(made_up_report()).replace("biology", EVIL))
    report["teacher"]["name"] = report["student"]["architecture"] = EVIL
    report["run"]["command"] = report["run"]["data"]["train"]["path"] = EVIL
    for part in ("samples", "diagnosis", "tokens", "run"):
        report[part] = evil_everywhere(report[part])
    page = render_page(report)
    assert page.count("&lt;script&gt;alert(1)") > 5
    assert "<script>alert" not in page and "<img src=x" not in page


def test_the_model_card_escapes_names_and_sentences():
    scores = {"kl": 0.1, "nll": 3.0, "teacher_nll": 2.9}
    info = {
        "name": f"# {EVIL}\n# x", "teacher": f"a`{EVIL}", "datasets": [f"`{EVIL}"], "target": f"`{EVIL}", "method": f"`{EVIL}",
        "tokens": 5, "rows": [{"name": f"a|b{EVIL}", "scores": scores}], "lost": [f"[x](javascript:alert(1)) {EVIL}"],
        "command": f"x\n```\n{EVIL}", "config": f"a = 1\n````\n{EVIL}",
    }  # fmt: skip
    card = model_card("name", info, dtype="bfloat16", parameters=10)
    outside, fence = [], ""
    for line in card.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if line == fence else fence
        elif len(ticks) >= 3:
            fence = ticks
        else:
            outside.append("".join(line.split("`")[::2]).replace("\\", ""))  # without code spans
    assert not fence, "every block of code is closed"
    shown = "\n".join(outside)
    assert "<script>" not in shown and "<img" not in shown and "a|b" not in card
    assert "\\[x](javascript" in card


# --- servers


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as its server's `act` says; keeps the Authorization headers it saw."""

    def do_POST(self):
        self.server.seen.append(self.headers.get("Authorization"))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.act(self)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(act) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.act, server.seen = act, []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays(serve, tmp_path, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    other = serve(lambda handler: handler.send_error(500))

    def redirect(handler):
        handler.send_response(code)
        handler.send_header("Location", address(other))
        handler.end_headers()

    first = serve(redirect)
    with pytest.raises(UserError, match="it redirects to") as error:
        collect(Endpoint(address(first), "m", wait=0.0), [Prompt([1], "x")], tmp_path, "prompts")
    assert first.seen == ["Bearer secret"] and not other.seen
    assert "secret" not in str(error.value)


def test_an_endless_answer_is_cut_off(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "_LARGEST_ANSWER", 2**20)
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while len(sent) < 2000:
                handler.wfile.write(bytes(65536))
                sent.append(1)
        except OSError:
            pass

    with pytest.raises(UserError, match="more than 1 MB"):
        collect(Endpoint(address(serve(flood)), "m", wait=0.0), [Prompt([1], "x")], tmp_path, "prompts")
    assert len(sent) < 2000
