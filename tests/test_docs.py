"""The recipes in the documentation are ones that moeft reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeft.config import SftRecipe, validate_training_fields
from moeft.errors import CheckpointError
from moeft.merging import merge


def recipes(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[1] / "docs" / page).read_text("utf-8"), re.DOTALL)


RECIPES = recipes("recipes.md")


def test_sft_recipe_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPES[0], "utf-8")
    recipe = SftRecipe.load(tmp_path / "recipe.yaml")
    validate_training_fields(recipe.training)


def test_recipe_with_a_gate_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes("evaluation.md")[0], "utf-8")
    gate = SftRecipe.load(tmp_path / "recipe.yaml").gate
    assert gate is not None
    assert [watched.task for watched in gate.tasks] == ["hellaswag", "wikitext", "language"]
    assert gate.data == tmp_path / "../shared/data"


def test_merge_recipe_is_read_up_to_the_missing_base(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPES[1], "utf-8")
    with pytest.raises((CheckpointError, OSError), match="gemma-4-26b"):
        merge(tmp_path / "recipe.yaml", tmp_path / "out", progress=False)


def test_recipe_of_a_mixture_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes("data.md")[0], "utf-8")
    assert len(SftRecipe.load(tmp_path / "recipe.yaml").data.train) == 4
