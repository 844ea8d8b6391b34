"""`moe2dense list` reads the registries, and no name in it is cut."""

import json

import pytest

from moe2dense.__main__ import main
from moe2dense.cli.list import catalogue
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.families.cards import student_cards, teacher_cards
from moe2dense.families.machines import machine_names
from moe2dense.losses.registry import DIVERGENCES, FEATURE_KINDS, LAYER_MAPS
from moe2dense.student.ffn.methods import METHODS, RECIPES
from moe2dense.student.init_spec import STEPS


def test_everything_is_listed():
    lists = catalogue()
    names = {title: {row.get("name") or row["family"] for row in rows} for title, rows in lists.items()}
    assert names == {
        "teachers": set(teacher_cards()),
        "students": set(student_cards()),
        "methods": {*RECIPES, *METHODS, *STEPS},
        "losses": set(DIVERGENCES),
        "features": {*FEATURE_KINDS, *LAYER_MAPS},
        "regimes": set(REGIMES),
        "targets": set(TARGET_FORMATS),
        "machines": set(machine_names()),
    }
    assert all(row["help"] for title in ("methods", "losses", "features", "regimes", "targets") for row in lists[title])


@pytest.mark.parametrize("what", ["all", *catalogue()])
def test_nothing_is_cut_at_80_columns(what, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", what]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert main(["list", what, "--json"]) == 0
    for rows in json.loads(capsys.readouterr().out).values():
        for row in rows:
            names = [row.get("name") or row["family"], *(c["id"] for c in row.get("checkpoints", []))]
            assert all(name in shown for name in names)


def test_all_types_of_the_installed_transformers_have_a_status(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", "teachers", "--all"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert main(["list", "teachers", "--all", "--json"]) == 0
    rows = {row["family"]: row for row in json.loads(capsys.readouterr().out)["teachers"]}
    assert all(rows[name]["status"] == "served" and rows[name]["host"] == c.host for name, c in teacher_cards().items())
    assert {row["status"] for row in rows.values()} <= {"served", "not served", "new"}
    assert all(row.get("reason") for row in rows.values() if row["status"] == "not served")
    assert all(f"  {name}" in shown for name in rows)


def test_a_type_without_card_or_reason_is_new(monkeypatch, capsys):
    """A new release of transformers, or a card that is taken away."""
    from moe2dense.cli.actions import list_types

    cards = {name: card for name, card in teacher_cards().items() if name != "mixtral"}
    monkeypatch.setattr(list_types, "teacher_cards", lambda: cards)
    rows = {row["family"]: row["status"] for row in list_types.all_types()}
    assert rows["mixtral"] == "new" and rows["qwen3_moe"] == "served"


def test_all_belongs_to_teachers(capsys):
    assert main(["list", "losses", "--all"]) == 2
    assert "--all belongs to `moe2dense list teachers`" in capsys.readouterr().err
