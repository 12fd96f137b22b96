"""Whole models as GGUF: read back by llama.cpp's own reader, and refused where something is wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeft
from moeft import gguf
from moeft.cli import main
from moeft.errors import CheckpointError, UnsupportedModelError
from tests.tiny_checkpoints import disk_tensors, save_base
from tests.tiny_models import tiny_config

BASE = Path(moeft.__file__).parent / "demo" / "base"
FAMILIES = ("gemma4", "gemma3", "qwen3_moe", "olmoe", "llama")


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model of a family that llama.cpp knows as it is, with a tokenizer of its vocabulary."""
    torch.manual_seed(0)
    config = tiny_config(family)
    if family == "qwen3_moe":
        config.mlp_only_layers, config.norm_topk_prob = [], True
    if family == "olmoe":
        config.num_key_value_heads = config.num_attention_heads
    if family == "gemma3":
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    vocabulary = {f"t{index}": index for index in range(config.vocab_size - 2)}
    added = {"id": 1, "content": "<end>", "special": True}, {"id": 3, "content": "<tool>", "special": False}
    bpe = {"type": "BPE", "byte_fallback": family.startswith("gemma"), "vocab": vocabulary, "merges": [["t", "1"]]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": bpe, "added_tokens": added}))
    return folder


def values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an F32 file, by our header and numpy."""
    raw, found = path.read_bytes(), {}
    for tensor in gguf.read_header(path)["tensors"]:
        data = np.frombuffer(raw, "<f4", tensor["bytes"] // 4, tensor["offset"])
        found[tensor["name"]] = data.reshape(tensor["shape"])
    return found


def read_metadata(path: Path) -> dict[str, Any]:
    entries = gguf.read_header(path)["metadata"]
    return {key: (v["value"]["value"] if v["type"] == "array" else v["value"]) for key, v in entries}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_family_is_in_the_file(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    gguf.export(model, tmp_path / "m.gguf", type="f32")
    ours = {name: array for name, array in values(tmp_path / "m.gguf").items() if name != "rope_freqs.weight"}
    theirs = {name: tensor.float() for name, tensor in disk_tensors(model).items()}
    if family in ("gemma3", "gemma4"):
        theirs.pop("lm_head.weight", None)
    assert sum(array.size for array in ours.values()) == sum(tensor.numel() for tensor in theirs.values())
    offset = sum(t.numel() for name, t in theirs.items() if "norm" in name) if family == "gemma3" else 0
    total = sum(tensor.double().sum().item() for tensor in theirs.values())
    assert sum(float(array.sum(dtype=np.float64)) for array in ours.values()) == pytest.approx(total + offset)


def test_stacks_are_split_into_gate_and_up_whichever_way_they_lie(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe")
    gguf.export(model, tmp_path / "m.gguf", type="f32")
    found, disk = values(tmp_path / "m.gguf"), disk_tensors(model)
    for projection in ("gate", "up", "down"):
        singles = [disk[f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight"].float() for e in range(5)]
        assert np.array_equal(found[f"blk.0.ffn_{projection}_exps.weight"], torch.stack(singles).numpy())
    moeft.checkpoint.fuse_experts(model, tmp_path / "fused")
    gguf.export(tmp_path / "fused", tmp_path / "f.gguf", type="f32")
    fused = values(tmp_path / "f.gguf")
    assert all(np.array_equal(array, fused[name]) for name, array in found.items())


def test_heads_of_llama_are_interleaved(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    gguf.export(model, tmp_path / "m.gguf", type="f32")
    weight = disk_tensors(model)["model.layers.0.self_attn.q_proj.weight"].float()
    heads = json.loads((model / "config.json").read_text())["num_attention_heads"]
    halves = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    assert np.array_equal(values(tmp_path / "m.gguf")["blk.0.attn_q.weight"], halves.numpy())


def test_the_packaged_base_is_read_by_the_reader_of_llama_cpp(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf", reason="needs llama.cpp's reader: pip install gguf")
    report = gguf.export(BASE, tmp_path / "m.gguf", type="q4_k_m")
    found = reader.GGUFReader(tmp_path / "m.gguf")
    assert [(t.name, t.tensor_type.name.lower(), int(t.n_bytes)) for t in found.tensors] == [
        (t.name, t.type, t.bytes) for t in report.tensors
    ]
    assert {"q4_k", "q5_0", "q6_k", "q8_0", "f32"} == set(report.bytes_by_type())
    assert gguf.plan(BASE, tmp_path / "m.gguf", type="q4_k_m") == dataclasses.replace(report, seconds=0)
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    entries = read_metadata(tmp_path / "m.gguf")
    assert entries["gemma4.attention.head_count_kv"] == [2, 2, 2, 1]
    assert entries["gemma4.attention.sliding_window_pattern"] == [True, True, True, False]
    tokens = entries["tokenizer.ggml.tokens"]
    assert entries["tokenizer.ggml.token_type"][tokens.index("<|turn>")] == 3
    assert entries["tokenizer.chat_template"] == (BASE / "chat_template.jinja").read_text()


def test_split_files_hold_what_one_file_holds(tmp_path: Path) -> None:
    whole = gguf.export(BASE, tmp_path / "m.gguf", type="q8_0", threads=1)
    split = gguf.export(BASE, tmp_path / "s.gguf", type="q8_0", threads=2, max_shard_bytes=2_000_000)
    assert next(Path(file).name for file in split.files) == f"s-00001-of-{len(split.files):05}.gguf"
    assert len(split.files) > 2
    assert not list(tmp_path.glob("*.partial"))

    def blocks(files: tuple[str, ...]) -> dict[str, bytes]:
        tensors = ((Path(f).read_bytes(), t) for f in files for t in gguf.read_header(f)["tensors"])
        return {t["name"]: raw[t["offset"] : t["offset"] + t["bytes"]] for raw, t in tensors}

    assert blocks(split.files) == blocks(whole.files)
    assert read_metadata(Path(split.files[1])) == {
        "split.no": 1,
        "split.count": len(split.files),
        "split.tensors.count": len(whole.tensors),
    }


def test_a_value_that_is_not_finite_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has the non-finite .*\[3, 5\]"):
        gguf.export(model, tmp_path / "m.gguf", type="f16")
    assert not list(tmp_path.glob("m.gguf*"))


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "olmoe")
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="exists"):
        gguf.export(model, tmp_path / "there.gguf")
    with pytest.raises(ValueError, match=r"ends with \.gguf"):
        gguf.export(model, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="expected one of f32"):
        gguf.plan(model, type="q3_k_m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q9"):
        gguf.plan(model, tensor_types={"exps": "q9"})
    save_base(tmp_path / "gpt_oss", "gpt_oss", torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="gpt_oss as GGUF"):
        gguf.plan(tmp_path / "gpt_oss")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="expected 0 to 2"):
        gguf.plan(model)
    for key, problem in (("num_experts", "experts, expected"), ("vocab_size", "rows, expected")):
        (model / "config.json").write_text(json.dumps({**config, key: config[key] + 1}))
        with pytest.raises(CheckpointError, match=problem):
            gguf.plan(model)
    (model / "config.json").write_text(json.dumps(config))
    document = json.loads((model / "tokenizer.json").read_text())
    for key, value, problem in (("vocab", {"t": -1}, "has the id -1"), ("merges", [1], "no pairs of texts")):
        (model / "tokenizer.json").write_text(json.dumps({**document, "model": {**document["model"], key: value}}))
        with pytest.raises(CheckpointError, match=problem):
            gguf.plan(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        gguf.plan(model)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    gguf.export(BASE, tmp_path / "m.gguf", type="q8_0")
    raw = (tmp_path / "m.gguf").read_bytes()
    for name, damaged, match in (
        ("magic", b"GGML" + raw[4:], "no GGUF file"),
        ("version", raw[:4] + b"\x09" + raw[5:], "version 9"),
        ("count", raw[:8] + b"\xff" * 8 + raw[16:], "more than the file can hold"),
        ("cut", raw[:-5000], "past the end"),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=match):
            gguf.read_header(tmp_path / name)


def test_the_command_plans_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "gguf", str(BASE), str(tmp_path / "m.gguf"), "--type", "Q4_K_M", "--tensor-type", "exps=q8_0"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--dry-run"])
    printed = capsys.readouterr().out
    assert "q8_0" in printed
    assert "bits per weight" in printed
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--max-shard-size", "4 apples"])
    assert "'4 apples' is not a size in bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--max-shard-size", "1GB"])
    kinds = {t["name"]: t["type"] for t in gguf.read_header(tmp_path / "m.gguf")["tensors"]}
    assert kinds["blk.0.ffn_gate_up_exps.weight"] == "q8_0"
    assert kinds["blk.0.attn_q.weight"] == "q4_k"
