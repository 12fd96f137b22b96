"""Experts fused and taken apart on disk. Oracle: what transformers loads, and what it saves itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moeft import _core
from moeft.checkpoint import fuse_experts, unfuse_experts
from moeft.errors import CheckpointError, UnsupportedModelError
from tests.test_cli import moeft
from tests.tiny_checkpoints import contents, disk_tensors, save_base


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as transformers loads them; every one must be found."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.state_dict()


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_fused_stacks_are_those_that_transformers_makes(tmp_path, family):
    base = save_base(tmp_path / "base", family, torch.bfloat16, max_shard_size="30KB")
    report = fuse_experts(base, tmp_path / "fused")
    loaded, fused = state(base), disk_tensors(tmp_path / "fused")
    stacks = [name for name in loaded if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacks) == report.tensors_made == 2 * report.layers
    for name in stacks:
        assert torch.equal(fused[name], loaded[name])
    again = state(tmp_path / "fused")
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_stacks_taken_apart_are_the_tensors_that_transformers_saves(tmp_path, family):
    base = save_base(tmp_path / "base", family, torch.float16)
    fuse_experts(base, tmp_path / "fused")
    unfuse_experts(tmp_path / "fused", tmp_path / "apart")
    assert contents(tmp_path / "apart") == contents(base)


def tiny_gpt_oss(folder: Path) -> Path:
    """Biases and sinks of a new model are zero or uninitialised; all weights get noise."""
    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def test_transposed_interleaved_stacks_are_taken_apart_by_the_formula(tmp_path):
    base = tiny_gpt_oss(tmp_path / "base")
    report = unfuse_experts(base, tmp_path / "apart")
    stacks, apart = disk_tensors(base), disk_tensors(tmp_path / "apart")
    assert (report.tensors_read, report.tensors_made) == (2 * 4, 2 * 3 * 6)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up, bias = stacks[f"{experts}.gate_up_proj"], stacks[f"{experts}.gate_up_proj_bias"]
        for e in range(3):
            expected = {
                "gate_proj.weight": gate_up[e, :, ::2].T,
                "up_proj.weight": gate_up[e, :, 1::2].T,
                "down_proj.weight": stacks[f"{experts}.down_proj"][e].T,
                "gate_proj.bias": bias[e, ::2],
                "up_proj.bias": bias[e, 1::2],
                "down_proj.bias": stacks[f"{experts}.down_proj_bias"][e],
            }
            for name, tensor in expected.items():
                assert torch.equal(apart[f"{experts}.{e}.{name}"], tensor), name
    fuse_experts(tmp_path / "apart", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)


def test_multimodal_names_keep_their_prefix(tmp_path):
    base = save_base(tmp_path / "base", "gemma4", torch.float32)
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in disk_tensors(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    unfuse_experts(base, tmp_path / "apart")
    apart, stack = disk_tensors(tmp_path / "apart"), tensors["model.language_model.layers.1.experts.gate_up_proj"]
    up = apart["model.language_model.layers.1.experts.2.up_proj.weight"]
    assert torch.equal(up, stack[2, stack.shape[1] // 2 :])


def test_command_prints_what_it_did_and_refuses_a_second_time(tmp_path):
    base = save_base(tmp_path / "base", "olmoe", torch.bfloat16)
    done = moeft("layout", "fuse", base, tmp_path / "fused")
    assert done.returncode == 0, done.stderr
    assert "experts of 2 layers: 30 tensors -> 4, " in done.stdout
    again = moeft("layout", "fuse", tmp_path / "fused", tmp_path / "again")
    assert again.returncode == 1
    assert "is fused already, expected per expert; nothing is left to do" in again.stderr
    assert moeft("layout", "melt", base, tmp_path / "out").returncode == 2


def test_errors_of_the_core_have_their_own_classes(tmp_path):
    base = save_base(tmp_path / "base", "gemma4", torch.bfloat16)
    with pytest.raises(CheckpointError, match="nothing is left to do"):
        fuse_experts(base, tmp_path / "out")
    with pytest.raises(ValueError, match='direction is "melt", expected "fuse" or "unfuse"'):
        _core.convert_layout(base, tmp_path / "out", "melt")
    dense = save_base(tmp_path / "dense", "llama", torch.bfloat16)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))
    with pytest.raises(UnsupportedModelError, match="llama9"):
        unfuse_experts(dense, tmp_path / "out")


def save_sparse_gpt_oss(folder: Path) -> int:
    """One layer whose stacks take 0.3 GB, as a file of holes; returns the bytes of the larger stack."""
    folder.mkdir()
    experts, hidden, inner = 1, 4096, 12288
    shapes = {
        "gate_up_proj": [experts, hidden, 2 * inner],
        "gate_up_proj_bias": [experts, 2 * inner],
        "down_proj": [experts, inner, hidden],
        "down_proj_bias": [experts, hidden],
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        header[f"model.layers.0.mlp.experts.{name}"], offset = entry, end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "num_local_experts": experts}))
    return 4 * experts * hidden * inner


MEASURE = """
import resource, sys
from moeft import _core
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_core.convert_layout(sys.argv[1], sys.argv[2], sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_depend_on_the_size_of_a_stack(tmp_path):
    stack_bytes = save_sparse_gpt_oss(tmp_path / "base")
    for source, out, direction in [("base", "apart", "unfuse"), ("apart", "fused", "fuse")]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / out), direction]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert int(done.stdout) < 64 << 20 < stack_bytes
