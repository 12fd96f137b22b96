"""The recipe for Gemma 3 on a real model and real conversations, a few steps of it; ``benches`` has all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from moeft.config import SftRecipe
from moeft.data.check import check_file
from moeft.data.reading import RowReader
from moeft.data.rows import Row
from moeft.runs.preview import load_tokenizer
from moeft.runs.sft import run
from moeft.runs.training_rows import sft_arguments, training_rows
from tests import plain_sft, real_models

RECIPE = Path(__file__).parents[1] / "recipes" / "gemma3-4b-response-only.yaml"


def test_recipe_for_gemma_asks_for_what_was_published():
    recipe = SftRecipe.load(RECIPE)
    assert (recipe.lora.rank, recipe.lora.alpha, set(recipe.lora.targets)) == (8, 8, {"attention", "mlp"})
    assert (recipe.quantization.attention, recipe.quantization.mlp) == (True, True)
    wanted = {"optim": "adamw_moeft_8bit", "learning_rate": 2e-4, "lr_scheduler_type": "linear", "max_steps": 30}
    wanted |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert wanted.items() <= recipe.training.items()


@pytest.mark.slow
def test_array_of_conversations_that_is_cut_off_gives_all_before_the_cut_and_says_so():
    found = check_file(real_models.sharegpt(), turns="trim")
    assert found.num_rows + len(found.rejects) == 17_671 + 1
    assert found.rejects[-1].line == 17_672
    assert "the file ends inside of this record" in found.rejects[-1].reason


@pytest.mark.slow
def test_steps_on_a_real_model_equal_plain_peft_on_the_values_of_bitsandbytes(tmp_path):
    model, conversations = real_models.gemma3_270m(), RowReader(real_models.sharegpt(), turns="trim")
    rows = itertools.islice((row for row in conversations if isinstance(row, Row)), 24)
    lines = (json.dumps({"messages": row.messages}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    values = {"model": model, "output": tmp_path / "run", "dtype": "float32"}
    values |= {"data.train": tmp_path / "rows.jsonl", "data.eval": "null", "data.max_length": 32}
    training = {"max_steps": 2, "gradient_accumulation_steps": 1, "save_strategy": '"no"', "use_cpu": "true"}
    values |= {f"training.{key}": value for key, value in training.items()}
    recipe = SftRecipe.load(RECIPE, [f"{key}={value}" for key, value in values.items()])
    folder = run(recipe, show=lambda text: None)

    tokenizer, _ = load_tokenizer(recipe.model, None)
    args = sft_arguments(recipe, recipe.output)
    encoded, _ = training_rows(recipe.data, tokenizer, args, lambda text: None)
    plain = plain_sft.train(
        model,
        tokenizer,
        [{key: values.tolist() for key, values in row.items()} for row in encoded.examples],
        [],
        recipe.lora.rank,
        recipe.lora.alpha,
        recipe.lora.init_seed,
        rounded=True,
        output_dir=str(tmp_path / "plain"),
        **recipe.training | {"optim": "adamw_8bit"},
    )
    # Sums of 640 to 2,048 products in another order, twice per layer: 1e-6 each, and 18 layers.
    losses = [log["loss"] for log in folder.events("train_log")]
    assert losses == pytest.approx(plain["losses"], rel=1e-4)
    planned = folder.read_json("metrics.json")["plan"]
    assert planned["trainable_parameters"] == plain["trainable_parameters"]
    assert planned["parameters"] == plain["parameters"] - plain["trainable_parameters"]
