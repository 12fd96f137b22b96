"""Plans of preference tuning: what a micro-batch of pairs keeps, and the pass without gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM

import moeft
from moeft.config.dpo import DpoRecipe
from moeft.config.sft import Lora
from moeft.data.pair_batches import PairCollator
from moeft.errors import RecipeError
from moeft.integration.cpu_linears import multiply_in_core
from moeft.integration.fused_lora import fuse_lora
from moeft.integration.fused_loss import fuse_loss
from moeft.planning import plan
from moeft.planning.report import WEIGHTS
from moeft.planning.settings import Settings
from moeft.training.preference.scores import score_pairs
from tests.test_planning import peak_bytes
from tests.test_planning_activations import bytes_saved, predicted

LORA = Lora(rank=4, targets=("attention", "experts"))


def pair(length):
    """Two answers of one length behind a prompt of one token."""
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(length) > 0, 1, -100)
    sides = [{"input_ids": rng.integers(1, 60, length).astype(np.int32), "labels": labels} for _ in range(2)]
    sides[1]["input_ids"][0] = sides[0]["input_ids"][0]
    return {
        "chosen": sides[0],
        "rejected": sides[1],
        "num_shared": 1,
        "reference": np.zeros(2),
        "row": 0,
        "input_ids": np.concatenate([side["input_ids"] for side in sides]),
    }


def adapted(checkpoint, checkpointing):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", quantization_config=moeft.NF4Config())
    model = moeft.add_lora(model, LORA.rank, targets=LORA.targets, seed=0).train()
    fuse_loss(model.get_base_model())
    fuse_lora(model)
    if checkpointing == "full":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("layout", ["packed", "shared_prefix", "padded"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_micro_batch_of_pairs_keeps_what_is_forecast(checkpoints, layout, policy):
    checkpoint = checkpoints["gemma4"]
    model = adapted(checkpoint, policy)
    for num_pairs, length in ((1, 20), (3, 12)):
        batch = PairCollator(0, layout)([pair(length) for _ in range(num_pairs)])
        settings = Settings(
            lora=LORA,
            dtype="float32",
            max_length=length,
            batch_size=num_pairs,
            pairs=layout,
            fused_norms=False,
            checkpointing=policy,
        )
        kept = bytes_saved(model, lambda batch=batch: score_pairs(model, batch))
        assert predicted(checkpoint, settings) == pytest.approx(kept, rel=0.1)


def write_recipe(folder, checkpoint, **changes):
    content = {
        "model": str(checkpoint),
        "output": "out",
        "data": {"train": "pairs.jsonl", "max_length": 50, "layout": "packed"},
        "training": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4},
    }
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_recipe_of_pairs_is_planned(checkpoints, tmp_path):
    checkpoint = checkpoints["gemma4"]
    path = write_recipe(tmp_path, checkpoint)
    forecast = plan(checkpoint, recipe=path)
    settings = Settings(quantization=None, max_length=50, batch_size=2, pairs="packed", forward_batch_size=4,
                        checkpointing="none")  # fmt: skip
    assert forecast == plan(checkpoint, recipe=settings) == plan(checkpoint, recipe=DpoRecipe.load(path))
    assert "2 x 100 tokens" in str(forecast)
    rows = plan(checkpoint, recipe=replace(settings, pairs=None, max_length=100, packing=True))
    assert forecast.bytes_of("activations") == rows.bytes_of("activations")


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_of_pairs_on_the_cpu_takes_what_is_forecast(checkpoints, policy):
    checkpoint = checkpoints["gemma4"]
    model = adapted(checkpoint, policy)
    multiply_in_core(model.get_base_model())
    batch = PairCollator(0, "packed")([pair(128) for _ in range(2)])

    def step():
        score_pairs(model, batch).sums.sum().backward()

    step()
    model.zero_grad()
    settings = Settings(lora=LORA, dtype="float32", max_length=128, batch_size=2, pairs="packed", checkpointing=policy)
    forecast = plan(checkpoint, recipe=settings)
    before = sum(map(forecast.bytes_of, (*WEIGHTS, "adapter attention", "adapter experts", "optimizer state")))
    assert forecast.host.tensor_bytes - before == pytest.approx(peak_bytes(step), rel=0.15)
    assert "on the CPU, the pass without gradients over 1 pairs is not counted" in str(forecast)


def test_states_of_answers_are_in_the_memory_of_the_host_too(checkpoints):
    lora = Lora(targets=("attention",))
    settings = Settings(lora=lora, dtype="float32", max_length=50, pairs="packed", checkpointing="none")
    rows = replace(settings, pairs=None, max_length=100, packing=True)
    forecast, of_rows = (plan(checkpoints["gemma4"], recipe=asked) for asked in (settings, rows))
    assert forecast.host.tensor_bytes - of_rows.host.tensor_bytes == forecast.bytes_of("answer states") > 0


def test_large_passes_over_the_reference_decide_the_peak(checkpoints):
    settings = Settings(max_length=50, batch_size=1, pairs="packed", checkpointing="full", forward_batch_size=64)
    large = plan(checkpoints["gemma4"], recipe=settings)
    small = plan(checkpoints["gemma4"], recipe=replace(settings, forward_batch_size=1))
    assert large.peak_phase == "pass without gradients"
    assert small.peak_phase != large.peak_phase
    assert "training.per_device_eval_batch_size: 32" in [knob.name for knob in large.advice]


def test_a_typo_in_a_recipe_of_pairs_is_named(checkpoints, tmp_path):
    path = write_recipe(tmp_path, checkpoints["gemma4"], preference={"bta": 1.0})
    with pytest.raises(RecipeError, match=r"did you mean preference\.beta"):
        plan(checkpoints["gemma4"], recipe=path)
