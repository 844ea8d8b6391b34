"""`moe2dense list` reads the registries, and no name in it is cut."""

import json

import pytest

from moe2dense.__main__ import main
from moe2dense.cli.list import catalogue
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.families.cards import student_cards, teacher_cards
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
