"""Damaged files of every kind end in one UserError, whatever is damaged: values of other types, missing keys, bytes, nesting."""

import json
import random

import pytest
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.__main__ import main
from moe2dense.common.files import content_errors, read_json_object
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import write_config
from moe2dense.conversion.run import CONFIG, MANIFEST, check_out, open_run
from moe2dense.data.counts import TextCounts, Unusable
from moe2dense.data.fields import passage_of
from moe2dense.distillation.targets import store
from moe2dense.errors import UserError, first_line
from moe2dense.families.cards import read_teacher_card, student_host
from moe2dense.families.resolve import resolve_teacher
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.store import load_student, save_student
from moe2dense.student.types import Student
from moe2dense.weights.checkpoint import read_header
from moe2dense.weights.files import read_index, weight_files
from tests.reliability.test_trust import small_config

DEEP = "[" * 100_000


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 1500, text
    return text


# --- a teacher's folder


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "x"), ("hidden_size", None), ("hidden_size", []), ("hidden_size", -1), ("vocab_size", 10**30), ("hidden_act", 3),
        ("hidden_act", "none such"), ("num_local_experts", [None]), ("num_hidden_layers", -1), ("rope_parameters", "x"), ("rope_scaling", []),
        ("dtype", "5.24.0"), ("bos_token_id", [1]), ("model_type", None), ("model_type", 10**9), ("architectures", 0.5), ("initializer_range", [0.02]),
        ("num_key_value_heads", {}), ("quantization_config", "x"),
    ],
)  # fmt: skip
def test_a_config_of_other_types_is_one_sentence(tmp_path, field, value):
    config = small_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    try:
        resolved = resolve_teacher(str(tmp_path))
        teacher_geometry(resolved.config, resolved.card)
    except UserError as error:
        one_sentence(error)


@pytest.mark.parametrize("text", ["", "3", "null", "[]", "{", DEEP, '{"model_type": "mixtral"', "\x00" * 10])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        resolve_teacher(str(tmp_path))
    one_sentence(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", DEEP, '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        read_index(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "header", ["", "[]", DEEP, '{"a": 3}', '{"a": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}']
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_header(path)


# --- cards


@pytest.mark.parametrize(
    "lines, words",
    [
        ("checkpoints = 3", "checkpoints must be a list"),
        ("checkpoints = ['x']", "must be a table"),
        ("[[checkpoints]]\nid = 'a/b'\nconfig = 'x'", "config must be dict"),
        ("mixers = 'self_attn'", "mixers must be a list"),
        ("experts = -1", "experts must be str"),
        ("packing = 'x'", "packing must be bool"),
        ("defaults = [1]", "defaults must be dict"),
    ],
)
def test_a_card_of_other_types_is_refused(tmp_path, root, lines, words):
    table = [x for x in (root / "teachers/mixtral.toml").read_text().split("[[checkpoints]]")[0].splitlines()]
    key = lines.split(" ")[0]
    card = tmp_path / "card.toml"
    card.write_text("\n".join([*(x for x in table if not x.startswith(key + " ")), lines]))
    with pytest.raises(UserError, match=words):
        read_teacher_card(card)


def test_a_card_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "card.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(UserError, match="not valid TOML"):
        read_teacher_card(tmp_path / "card.toml")


def test_a_card_that_names_a_field_the_config_lacks_is_refused(tmp_path, root):
    text = (root / "teachers/mixtral.toml").read_text().split("[[checkpoints]]")[0]
    (tmp_path / "card.toml").write_text(text.replace('"intermediate_size"', '"moe_intermediate_size"'))
    with pytest.raises(UserError, match=r"expert_width = 'moe_intermediate_size' is no field"):
        teacher_geometry(small_config(), read_teacher_card(tmp_path / "card.toml"))


# --- what moe2dense wrote


MANIFEST_OF_A_STORE = {
    "version": store.VERSION, "teacher": "a-disk-b", "blocks": 2, "block": 8, "layers": 2, "hidden_size": 16,
    "options": {"format": "topk", "temperature": 1.0, "k": 4, "draws": 50, "dtype": "bfloat16", "seed": 0, "features": [], "routing": []},
    "shards": [{"file": "shard-0000000.safetensors", "from": 0, "to": 2, "xxh3": "00"}],
}  # fmt: skip


def test_a_damaged_store_is_refused_wherever_it_is_damaged(tmp_path):
    """Each entry of store.json is removed and replaced by values of other types, one at a time."""
    places = [(k,) for k in MANIFEST_OF_A_STORE] + [("shards", 0, k) for k in MANIFEST_OF_A_STORE["shards"][0]]
    for place in places:
        for value in (None, "x", -1, [], {}, [3], {"x": 1}, "missing"):
            manifest = json.loads(json.dumps(MANIFEST_OF_A_STORE))
            parent = manifest
            for step in place[:-1]:
                parent = parent[step]
            if type(value) is type(parent[place[-1]]) and value not in (-1, {}, [3], {"x": 1}):
                continue
            if value == "missing":
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            (tmp_path / "store.json").write_text(json.dumps(manifest))
            with pytest.raises(UserError, match="again") as error:
                store.read_manifest(tmp_path)
            one_sentence(error.value)
    (tmp_path / "store.json").write_text(json.dumps(MANIFEST_OF_A_STORE))
    assert store.read_manifest(tmp_path)["blocks"] == 2


def test_a_shard_outside_the_store_is_refused(tmp_path):
    manifest = json.loads(json.dumps(MANIFEST_OF_A_STORE))
    manifest["shards"][0]["file"] = "../../etc/passwd"
    (tmp_path / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not in its folder"):
        store.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        DEEP,
        "[1]",
        '{"stages": []}',
        '{"stages": {"build": 3}}',
        '{"stages": {"build": {"seconds": {}}}}',
        "{}",
        '{"stages": {"build": {"history": 3}}}',
        '{"stages": {"build": {"kl": []}}}',
        '{"stages": {}, "cost": []}',
        '{"stages": {}, "cost": {"build": 3}}',
        '{"stages": {}, "cost": {"build": {"memory": "1"}}}',
        '{"stages": {}, "cost": {"build": {"flops": {"cpu": null}}}}',
        '{"stages": {}, "cost": {"build": {"flops": [1.0]}}}',
        '{"stages": {}, "cost": {"build": {"memory_of_each": ["1"]}}}',
        '{"stages": {}, "cost": {"build": {"memory_of_each": 3}}}',
    ],
)
def test_a_damaged_run_is_refused(tmp_path, text):
    (tmp_path / CONFIG).write_text(write_config(RunConfig()))
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"run\.json"), open_run(tmp_path, RunConfig(), resume=True):
        pass


def test_a_run_killed_before_its_settings_were_written_can_be_started_again(tmp_path):
    """All it leaves is its lock and a file half-written."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (".lock", ".moe2dense.toml.123.tmp"):
        (folder / name).write_text("")
    check_out(folder)
    with open_run(folder, RunConfig()) as run:
        run.save()
    assert {p.name for p in folder.iterdir()} == {"moe2dense.toml", "run.json"}
    with pytest.raises(UserError, match="continue it with --resume"):
        check_out(folder)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    config = MistralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=40, rope_theta=777.0
    )  # fmt: skip
    student = Student(MistralForCausalLM(config), student_host("mistral"), [None, None], "teacher", "layerwise", 5, [])
    return save_student(student, tmp_path_factory.mktemp("student") / "student")


@pytest.mark.parametrize(
    "damage", [{"layers": 3}, {"layers": "x"}, {"host": None}, {"host": "none such"}, {"method": 3}, None, "text"]
)
def test_a_damaged_student_is_refused(student_folder, damage):
    file = student_folder / "student.json"
    sound = file.read_text()
    table = json.loads(sound)
    file.write_text(
        json.dumps([] if damage is None else {"host": "mistral"} if damage == "text" else {**table, **damage})
    )
    try:
        with pytest.raises(UserError) as error:
            load_student(student_folder)
        one_sentence(error.value)
    finally:
        file.write_text(sound)
    assert load_student(student_folder).method == "layerwise"


def test_damaged_reports_end_in_success_or_one_sentence(tmp_path, monkeypatch, root, capsys):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.delitem(__import__("sys").modules, "report", raising=False)
    from fault_inputs import mutate_json
    from report import made_up_report

    sound, codes = json.dumps(made_up_report(2, 2)).encode(), set()
    for seed in range(6):
        (tmp_path / "report.json").write_bytes(mutate_json(sound, random.Random(seed)))
        code = main(["report", str(tmp_path)])
        assert capsys.readouterr().err.count("error: ") == (code == 2)
        codes.add(code)
    assert codes == {0, 2}


# --- texts


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a\ud83d"}, {"text": "a", "domain": "\udc00"}, {"prompt": "\ud83d", "completion": "b"},
        {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"}]},
    ],
)  # fmt: skip
def test_half_a_character_is_no_text(record):
    with pytest.raises(Unusable, match="half a character"):
        passage_of(record)


def test_a_reason_can_be_printed_whatever_it_quotes():
    counts = TextCounts()
    counts.skip("a.jsonl line 1", "found \ud83d")
    assert next(iter(counts.reasons)).encode() == rb"found \ud83d"


# --- the pieces


def test_first_line_gives_the_line_that_another_announces():
    assert first_line(ValueError("Validation error for field 'x':\n    TypeError: expected int\nmore")) == (
        "Validation error for field 'x': TypeError: expected int"
    )
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 10_000))) == 300


def test_content_errors_name_the_file_and_the_remedy():
    for error in (KeyError("a"), TypeError("b"), AttributeError("c"), ZeroDivisionError("d"), RecursionError("e")):
        with (
            pytest.raises(UserError, match=r"^a\.json is damaged.*; write it again$"),
            content_errors("a.json", "write it again"),
        ):
            raise error
    with pytest.raises(UserError, match="^as it was$"), content_errors("a.json", ""):
        raise UserError("as it was")
    with pytest.raises(UserError, match="cannot be read"):
        read_json_object("/nonexistent/a.json", "write it again")
