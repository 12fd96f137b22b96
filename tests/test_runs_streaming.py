"""``moeft sft`` with streamed experts: the same adapter, and recipes that cannot stream are refused before the run."""

from __future__ import annotations

import pytest
import torch

import moeft
from moeft.errors import MoeftError, RecipeError
from moeft.planning import plan
from tests.test_runs_sft import start, write_recipe
from tests.tiny_models import save_tiny_model
from tests.tiny_training import tiny_tokenizer


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny packed checkpoint with its tokenizer."""
    root = tmp_path_factory.mktemp("packed")
    moeft.checkpoint.quantize(save_tiny_model("gemma4", root / "base", torch.bfloat16), root / "packed")
    tiny_tokenizer().save_pretrained(root / "packed")
    return root / "packed"


def recipe(folder, packed, name, **memory):
    training = {"max_steps": 3, "save_steps": 3, "activation_checkpointing": "full"}
    return write_recipe(folder, packed, name, quantization=None, memory=memory, training=training)


def test_streamed_run_saves_the_adapter_of_a_resident_one(packed, tmp_path):
    adapters, streamed = [], {}
    resident = recipe(tmp_path, packed, "resident")
    device_bytes = plan(packed, recipe=resident).device_bytes
    memories = {
        "resident": {},
        "host": {"experts": "stream"},
        "disk": {"experts": "auto", "vram": device_bytes - 1000, "backing": "disk"},
    }
    for name, memory in memories.items():
        folder = start(recipe(tmp_path, packed, name, **memory))
        streamed[name] = folder.read_json("metrics.json").get("streaming")
        adapters.append((folder.path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]
    assert streamed["resident"] is None
    assert streamed["host"]["resident"] == []
    assert streamed["host"]["host_bytes"] > streamed["host"]["slot_bytes"] > 0
    assert streamed["disk"]["host_bytes"] == 0
    assert len(streamed["disk"]["resident"]) < 3


def test_auto_keeps_what_fits(packed, tmp_path):
    folder = start(recipe(tmp_path, packed, "auto", experts="auto", vram="8GiB"))
    assert "streaming" not in folder.read_json("metrics.json")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"vram": "12 apples"}, r"memory\.vram: '12 apples' is not a size in bytes"),
        ({"experts": "stream", "vram": "1MiB"}, r"memory\.vram is 1MiB, and the plan is .* over the card's memory"),
        ({"experts": "sometimes"}, r"memory\.experts"),
        ({"expert": "stream"}, r"memory\.expert.*did you mean"),
    ],
)
def test_memory_that_cannot_be_had_is_refused(packed, tmp_path, memory, message):
    with pytest.raises(MoeftError, match=message):
        start(recipe(tmp_path, packed, "run", **memory))


def test_disk_needs_a_packed_checkpoint_and_frozen_experts(packed, tmp_path):
    base = packed.parent / "base"
    with pytest.raises(RecipeError, match=r"memory\.backing: disk reads experts from the files of a packed checkpoint"):
        start(write_recipe(tmp_path, base, memory={"experts": "stream", "backing": "disk"}))
    trained = {"train": ["experts"], "lora": None, "quantization": None}
    with pytest.raises(RecipeError, match=r"streams frozen experts, and `train` names experts"):
        start(write_recipe(tmp_path, base, memory={"experts": "stream"}, **trained))
    assert not (tmp_path / "run").exists()
