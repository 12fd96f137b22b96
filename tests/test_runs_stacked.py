"""A run that trains an adapter on top of a loaded one, killed and started again."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

import moeft
from tests.test_runs_sft import base, kill_after_first_checkpoint, start, write_recipe  # noqa: F401
from tests.tiny_models import randomise_lora
from tests.tiny_training import load


def test_killed_run_on_a_loaded_adapter_continues_to_identical_weights(base, tmp_path):  # noqa: F811
    first = moeft.add_lora(load(base, quantization_config=moeft.NF4Config()), 2, targets=("attention", "experts"))
    randomise_lora(first)
    first.save_pretrained(tmp_path / "first")
    changes = {
        "lora": {"rank": 4, "dtype": "bfloat16", "stack_on": [str(tmp_path / "first")]},
        "training": {"max_steps": 8, "save_steps": 3, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    }
    whole = start(write_recipe(tmp_path, base, "whole", **changes))
    path = write_recipe(tmp_path, base, "killed", **changes)
    kill_after_first_checkpoint(path, tmp_path / "killed")
    continued = start(path)
    assert continued.record["attempts"] == 2
    files = [folder.path / "adapter" / "adapter_model.safetensors" for folder in (continued, whole)]
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    assert any(weight.abs().sum() > 0 for name, weight in theirs.items() if "lora_B" in name)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    figures = [folder.read_json("metrics.json")["heldout"] for folder in (continued, whole)]
    assert figures[0] == figures[1]
