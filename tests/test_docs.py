"""The recipes in the documentation are ones that moeft reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeft.config import SftRecipe, validate_training_fields
from moeft.config.dpo import DpoRecipe
from moeft.config.iterate import IterateRecipe
from moeft.config.pipeline import PipelineRecipe, steps
from moeft.errors import CheckpointError
from moeft.merging import merge
from moeft.runs import stages


def recipes(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[1] / "docs" / page).read_text("utf-8"), re.DOTALL)


ADAPTER, IN_FULL, PIPELINE, MERGE = recipes("recipes.md")


@pytest.mark.parametrize("text", [ADAPTER, IN_FULL], ids=["adapter", "in full"])
def test_sft_recipe_loads(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    recipe = SftRecipe.load(tmp_path / "recipe.yaml")
    validate_training_fields(recipe.training)


def test_recipe_with_a_gate_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes("evaluation.md")[0], "utf-8")
    gate = SftRecipe.load(tmp_path / "recipe.yaml").gate
    assert gate is not None
    assert [watched.task for watched in gate.tasks] == ["hellaswag", "wikitext", "language"]
    assert gate.data == tmp_path / "../shared/data"


def test_merge_recipe_is_read_up_to_the_missing_base(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MERGE, "utf-8")
    with pytest.raises((CheckpointError, OSError), match="gemma-4-26b"):
        merge(tmp_path / "recipe.yaml", tmp_path / "out", progress=False)


def test_pipeline_and_its_stages_load(tmp_path):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    (tmp_path / "style.yaml").write_text("model: gemma-it\ndata: {train: rows.jsonl}", "utf-8")
    made = steps(PipelineRecipe.load(tmp_path / "pipeline.yaml"))
    assert len(made) == 9
    assert stages.read(made[0]).lora.rank == 8


def test_recipe_of_a_mixture_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes("data.md")[0], "utf-8")
    assert len(SftRecipe.load(tmp_path / "recipe.yaml").data.train) == 4


def test_preference_recipes_load(tmp_path):
    tuning, rounds = recipes("preference.md")
    (tmp_path / "dpo.yaml").write_text(tuning, "utf-8")
    (tmp_path / "iterate.yaml").write_text(rounds, "utf-8")
    validate_training_fields(DpoRecipe.load(tmp_path / "dpo.yaml").training)
    validate_training_fields(IterateRecipe.load(tmp_path / "iterate.yaml").training)
