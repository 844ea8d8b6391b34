"""Every recipe is read, and (slow) runs on the example teacher with a tiny budget."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import moe2dense as m2d
from moe2dense.config.toml import read_toml
from moe2dense.conversion.checks import check_settings
from moe2dense.conversion.configure import configure

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.toml"))
SMALL = {
    "build": {"min_tokens": 2048, "local_steps": 5, "layer_steps": 3, "heal_epochs": 1.0, "gram_tokens": 512},
    "train": {"tokens": 8192, "batch": 1024},
    "data": {"eval_blocks": 4},
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe, tiny):
    check_settings(configure(str(tiny), "3.2m", recipe, {}))
    assert recipe.read_text().startswith("#")  # says what it is


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_run(recipe, tiny, tmp_path):
    import tomlkit

    table = read_toml(recipe)
    for section, values in SMALL.items():
        table[section] = (
            table.get(section, {}) | values | ({"tokens": 0} if table.get(section, {}).get("tokens") == 0 else {})
        )
    config = tmp_path / "small.toml"
    config.write_text(tomlkit.dumps(table))
    result = m2d.convert(str(tiny), to="3.2m", out=tmp_path / "out", config=config, control=False)
    assert AutoModelForCausalLM.from_pretrained(result.model).num_parameters() == 3_196_608
    assert result.scores["student"]["kl"]["value"] > 0
