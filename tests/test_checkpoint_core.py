"""Checkpoints in Rust: read, packed, resumed. Oracles: safetensors' reader and bitsandbytes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeft import _core
from moeft.errors import CheckpointError, UnsupportedModelError
from tests.tiny_checkpoints import contents, disk_tensors, save_adapter, save_base
from tests.tiny_models import FAMILY_NAMES

MERGE = "_core.merge_checkpoint(recipe, '.', out, progress)"
QUANTIZE = "_core.quantize_checkpoint(base, out, options, progress)"
OPTIONS = json.dumps({"attention": True, "double_quant": True, "max_shard_bytes": 20_000})


def quantize(source: Path, out: Path, **options: object) -> dict:
    return json.loads(_core.quantize_checkpoint(source, out, json.dumps(options)))


def weight_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    base = save_base(folder / "base", "qwen3_moe", torch.bfloat16, max_shard_size="50KB")
    return base, save_adapter(folder / "adapter", base)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_bytes_equal_bitsandbytes(tmp_path, family, double_quant):
    base = save_base(tmp_path / "base", family, torch.bfloat16)
    report = quantize(base, tmp_path / "out", attention=True, double_quant=double_quant)
    packed = disk_tensors(tmp_path / "out")
    weights = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    stacks = [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    linears = [name for name in weights if name.endswith(tuple(f"{part}_proj.weight" for part in "qkvo"))]
    assert stacks
    for name in stacks:
        base_name = name.removesuffix("_proj") + "_nf4"
        expected = [quantize_4bit(expert, blocksize=64, quant_type="nf4") for expert in weights[name]]
        assert torch.equal(packed[f"{base_name}.packed"], torch.stack([value.flatten() for value, _ in expected]))
        absmax = torch.stack([state.absmax for _, state in expected])
        check_absmax(packed, base_name, absmax, double_quant)
    for name in linears:
        value, state = quantize_4bit(weights[name], blocksize=64, quant_type="nf4")
        assert torch.equal(packed[f"{name}_nf4.packed"], value.flatten())
        check_absmax(packed, f"{name}_nf4", state.absmax, double_quant)
    before = disk_tensors(base)
    copied = packed.keys() & before.keys()
    assert all(torch.equal(packed[name], before[name]) for name in copied)
    assert not [name for name in packed.keys() - copied if "_nf4." not in name]
    assert report["weights_packed"] == len(stacks) + len(linears)
    assert report["components"]["experts"]["before"] == sum(weights[name].nbytes for name in stacks)
    assert report["total"]["after"] == sum(tensor.nbytes for tensor in packed.values())
    assert report["total"] == {
        side: sum(part[side] for part in report["components"].values()) for side in ("before", "after")
    }


def check_absmax(packed: dict, name: str, absmax: torch.Tensor, double_quant: bool) -> None:
    stored = packed[f"{name}.absmax"]
    assert stored.shape == absmax.shape
    if not double_quant:
        assert torch.equal(stored, absmax)
        return
    assert stored.dtype == torch.uint8
    nested, offset = packed[f"{name}.nested_absmax"], packed[f"{name}.nested_offset"]
    assert nested.shape == (-(-absmax.numel() // 256),)
    restored = np.empty(absmax.numel(), dtype=np.float32)
    _core.nf4_unnest(stored.flatten().numpy(), nested.numpy(), float(offset), restored)
    # The coarsest step of the dynamic map is 0.7 % of the largest deviation.
    assert np.abs(restored - absmax.flatten().numpy()).max() <= 0.008 * float(nested.max())


def test_config_keeps_every_field_and_its_order(tmp_path, qwen):
    base, _ = qwen
    quantize(base, tmp_path / "out", block_size=128)
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    packing = after.pop("quantization_config")
    assert list(after.items()) == list(before.items())
    assert packing == {
        "quant_method": "moeft_nf4",
        "experts": True,
        "attention": False,
        "mlp": False,
        "double_quant": False,
        "block_size": 128,
        "base_fingerprint": _core.fingerprint(base),
    }
    with pytest.raises(CheckpointError, match="is packed already"):
        quantize(tmp_path / "out", tmp_path / "again")


def test_sharding_does_not_change_what_is_packed(tmp_path, qwen):
    base, _ = qwen
    whole = save_base(tmp_path / "whole", "qwen3_moe", torch.bfloat16)
    quantize(base, tmp_path / "a", mlp=True)
    report = quantize(whole, tmp_path / "b", mlp=True, max_shard_bytes=20_000)
    left, right = disk_tensors(tmp_path / "a"), disk_tensors(tmp_path / "b")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["total"]["after"]
    assert index["weight_map"].keys() == right.keys()
    assert not (tmp_path / "a" / "model.safetensors.index.json").exists()


def test_header_is_the_one_that_safetensors_writes(tmp_path, qwen):
    base, _ = qwen
    quantize(base, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_tensors_lists_what_safetensors_reads(qwen):
    base, _ = qwen
    listed = json.loads(_core.tensors(base))
    expected = disk_tensors(base)
    assert [row["name"] for row in listed] == sorted(expected)
    for row in listed:
        assert row["dtype"] == "BF16"
        assert row["shape"] == list(expected[row["name"]].shape)
        assert row["bytes"] == expected[row["name"]].nbytes
        assert row["name"] in load_file(base / row["file"])


def test_fingerprint_sees_content_names_and_shapes(tmp_path):
    tensor = torch.arange(20_000, dtype=torch.float32)
    variants = {
        "same": {"x": tensor},
        "first": {"x": tensor.index_put((torch.tensor(0),), torch.tensor(5.0))},
        "middle": {"x": tensor.index_put((torch.tensor(10_000),), torch.tensor(5.0))},
        "last": {"x": tensor.index_put((torch.tensor(19_999),), torch.tensor(5.0))},
        "shape": {"x": tensor.reshape(200, 100)},
        "dtype": {"x": tensor.view(torch.int32)},
        "name": {"y": tensor},
    }
    found = set()
    for name, tensors in variants.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        found.add(_core.fingerprint(tmp_path / f"{name}.safetensors"))
    assert len(found) == len(variants)


@pytest.mark.parametrize(
    ("value", "position"), [(float("nan"), [3, 7, 11]), (float("inf"), [0, 0, 0]), (float("-inf"), [4, 39, 47])]
)
def test_non_finite_weight_is_refused_by_name_and_position(tmp_path, value, position):
    base = save_base(tmp_path / "base", "gemma4", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.experts.gate_up_proj"][tuple(position)] = value
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        quantize(base, tmp_path / "out")
    assert "model.layers.1.experts.gate_up_proj has the non-finite value" in str(error.value)
    assert str(position) in str(error.value)
    assert not (tmp_path / "out").exists()


def without_shard(folder: Path) -> None:
    (folder / "model-00002-of-00006.safetensors").unlink()


def truncated(folder: Path) -> None:
    with (folder / "model-00001-of-00006.safetensors").open("r+b") as file:
        file.truncate(100)  # in the middle of the header


def cut_data(folder: Path) -> None:
    path = folder / "model-00001-of-00006.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def duplicated(folder: Path) -> None:
    path = folder / "model-00001-of-00006.safetensors"
    other = folder / "model-00002-of-00006.safetensors"
    name, tensor = next(iter(load_file(path).items()))
    save_file(load_file(other) | {name: tensor}, other)


def absent(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00006.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')


def no_expert(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    path = folder / index["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def fewer_experts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_shard, r"model-00002-of-00006.safetensors is named in the index but does not exist"),
        (truncated, "the file ends after 100; the file is truncated"),
        (cut_data, "truncated or damaged, download or copy it again"),
        (duplicated, "and again in .*model-00002"),
        (absent, "the index says that model.ghost is here"),
        (outside, "not a plain file name"),
        (no_expert, "model.layers.2.mlp.experts.3.up_proj.weight is missing.*5 experts per layer"),
        (no_config, "a checkpoint needs its config.json"),
        (bad_config, "config.json: not a JSON object"),
        (fewer_experts, "config.json says 4 experts"),
        (only_pickle, "pickled weights"),
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, qwen, damage, message):
    base = shutil.copytree(qwen[0], tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) == 6
    damage(base)
    before = contents(base)
    with pytest.raises(CheckpointError, match=message):
        quantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert contents(base) == before


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"header": b"", "length": 1 << 40}, "more than the 100 MB"),
        ({"header": b"{}", "length": 50}, "claims 50 bytes but the file ends after 10"),
        ({"header": b"[1]"}, "opening brace"),
        ({"header": b'{"a": '}, "not a JSON object"),
        ({"header": {"a": 3}}, "a: invalid type"),
        ({"header": {"__metadata__": {"a": 3}}}, "__metadata__.a is not a string"),
        ({"header": {"a": {**ONE, "dtype": "F33"}}, "data": b"0000"}, 'dtype "F33"'),
        ({"header": {"a": {**ONE, "shape": [2]}}, "data": b"0000"}, r"F32 \[2\], 8 bytes, but its offsets span 4"),
        ({"header": {"a": {**ONE, "data_offsets": [4, 0]}}, "data": b"0000"}, "offsets span 0"),
        ({"header": {"a": {**ONE, "data_offsets": [4, 8]}}, "data": b"00000000"}, "leave a hole"),
        ({"header": {"a": ONE, "b": ONE}, "data": b"0000"}, "overlap"),
        ({"header": {"a": ONE}, "data": b"000"}, "need 4 bytes of data but the file has 3"),
        ({"header": {"a": ONE}, "data": b"00000"}, "need 4 bytes of data but the file has 5"),
        ({"header": f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode(), "data": b"0000"}, '"a" twice'),
        ({"header": {"a": {**ONE, "shape": [1 << 62, 8]}}, "data": b"0000"}, "offsets span 4"),
    ],
)
def test_damaged_header_is_refused(tmp_path, arguments, message):
    path = weight_file(tmp_path / "model.safetensors", **arguments)
    with pytest.raises(CheckpointError, match=message):
        _core.tensors(path)


def test_short_or_missing_file_is_refused(tmp_path):
    (tmp_path / "short.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="too short for a safetensors file"):
        _core.fingerprint(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="no such folder"):
        _core.fingerprint(tmp_path / "missing")


def test_options_are_checked(tmp_path, qwen):
    base, _ = qwen
    for options, message in [
        ({"expert": True}, "unknown field `expert`"),
        ({"experts": False}, "at least one of them to be true"),
        ({"block_size": 48}, "block_size is 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize(base, tmp_path / "out", **options)
    mixtral = save_base(tmp_path / "mixtral", "mixtral", torch.bfloat16)
    quantize(mixtral, tmp_path / "dense", mlp=True)  # it has none, which many families do not
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(config | {"model_type": "mixtril"}))
    with pytest.raises(UnsupportedModelError, match="mixtril"):
        quantize(mixtral, tmp_path / "out")


def test_interrupted_stamp_leaves_the_old_file(tmp_path):
    path = weight_file(tmp_path / "a.safetensors", {"a": ONE}, b"0000")
    before = path.read_bytes()
    path.parent.chmod(0o755)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            _core.stamp_metadata(path, {"key": "value" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == {"a.safetensors": before}


# Work in another process, so that it can be killed, starved and measured.

SCRIPT = """
import json, os, resource, signal, sys
from moeft import _core
base, out, recipe, options, die_at = sys.argv[1:6]
def progress(done, total, what):
    if done >= float(die_at) * total:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_elsewhere(
    work: str, base: Path, adapter: Path, out: Path, die_at: float = 2.0, before: str = ""
) -> subprocess.CompletedProcess:
    """Run ``work``; kill -9 at the first report past the share ``die_at`` of the bytes; the last one always comes."""
    recipe = json.dumps({"merge_method": "lora", "base_model": str(base), "models": [{"adapter": str(adapter)}]})
    command = [sys.executable, "-c", SCRIPT + before + work, str(base), str(out), recipe, OPTIONS, str(die_at)]
    source = str(Path(_core.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("work", [MERGE, QUANTIZE], ids=["merge", "quantize"])
def test_killed_run_goes_on_to_the_same_bytes(tmp_path, qwen, work):
    base, adapter = qwen
    assert run_elsewhere(work, base, adapter, tmp_path / "expected").returncode == 0
    died = run_elsewhere(work, base, adapter, tmp_path / "out", die_at=0.6)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "out").exists()
    with (tmp_path / "out.partial" / ".moeft" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"shard": "model-0000')  # a line that a kill cut off
    again = run_elsewhere(f"print({work})", base, adapter, tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["shards_resumed"] > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("work", [MERGE, QUANTIZE], ids=["merge", "quantize"])
def test_full_disk_is_an_error_and_the_next_run_goes_on(tmp_path, qwen, work):
    base, adapter = qwen
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))\n"
    full = run_elsewhere(work, base, adapter, tmp_path / "out", before=limit)
    assert full.returncode == 1
    assert "OSError: [Errno 27] cannot write" in full.stderr
    assert not (tmp_path / "out").exists()
    assert run_elsewhere(work, base, adapter, tmp_path / "out").returncode == 0
    assert run_elsewhere(work, base, adapter, tmp_path / "expected").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def stopped(base: Path, out: Path) -> None:
    """Stop a quantisation when its last file is being written."""

    def stop(done: int, total: int, what: str) -> None:
        if done == total:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        _core.quantize_checkpoint(base, out, OPTIONS, stop)


def test_changed_plan_or_input_is_not_resumed(tmp_path, qwen):
    base = shutil.copytree(qwen[0], tmp_path / "base")
    stopped(base, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"another plan.*delete that folder"):
        quantize(base, tmp_path / "out")
    os.utime(base / "model-00001-of-00006.safetensors")
    with pytest.raises(CheckpointError, match=r"out.partial holds an interrupted run of another plan"):
        _core.quantize_checkpoint(base, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_what_changed_since_it_was_written_is_written_again(tmp_path, qwen):
    stopped(qwen[0], tmp_path / "out")
    file = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = json.loads(_core.quantize_checkpoint(qwen[0], tmp_path / "out", OPTIONS))
    assert report["bytes_resumed"] > 0
    _core.quantize_checkpoint(qwen[0], tmp_path / "expected", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_second_writer_of_one_output_is_refused(tmp_path, qwen):
    refused = []

    def start_another(done: int, total: int, what: str) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="being written by another process"):
                _core.quantize_checkpoint(qwen[0], tmp_path / "out", OPTIONS)
            refused.append(what)

    _core.quantize_checkpoint(qwen[0], tmp_path / "out", OPTIONS, start_another)
    assert refused


def test_foreign_partial_folder_is_left_alone(tmp_path, qwen):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="delete that folder"):
        quantize(qwen[0], tmp_path / "out")
    assert contents(tmp_path / "out.partial") == {"mine.txt": b"x"}


def write_large_checkpoint(folder: Path) -> int:
    """One Gemma-4 layer whose ``gate_up_proj`` alone is 0.8 GB of bf16; returns the bytes of all tensors."""
    folder.mkdir()
    experts, hidden, inner = 16, 3072, 4096
    shapes = {"gate_up_proj": [experts, 2 * inner, hidden], "down_proj": [experts, hidden, inner]}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        header[f"model.layers.0.experts.{name}"], offset = entry, end
    chunk = (torch.randn(experts * hidden * 64) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    assert offset % len(chunk) == 0
    with weight_file(folder / "model.safetensors", header).open("ab") as file:
        for _ in range(offset // len(chunk)):
            file.write(chunk)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4_text", "num_experts": experts}))
    return offset


def write_large_adapter(folder: Path) -> None:
    """Rank 16 on both stacks of the large checkpoint."""
    folder.mkdir()
    experts, hidden, inner, rank = 16, 3072, 4096, 16
    key = "base_model.model.model.layers.0.experts"
    save_file(
        {
            f"{key}.lora_A.weight": torch.randn(experts * rank, inner) * 0.01,
            f"{key}.lora_B.weight": torch.randn(hidden, rank * experts) * 0.01,
            f"{key}.base_layer.lora_A.weight": torch.randn(experts * rank, hidden) * 0.01,
            f"{key}.base_layer.lora_B.weight": torch.randn(2 * inner, rank * experts) * 0.01,
        },
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": rank,
        "lora_alpha": 16,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_memory_does_not_depend_on_the_size_of_a_tensor(tmp_path):
    total = write_large_checkpoint(tmp_path / "base")
    write_large_adapter(tmp_path / "adapter")
    measure = """
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
%s
print(peak() - before)
"""
    options = "options = '{\"double_quant\": true}'\n"
    for work in (MERGE, QUANTIZE):
        done = run_elsewhere(options + measure % work, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 256 << 20 < total
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("below", ["packed", "new/packed", "../base/packed"])
def test_output_inside_of_the_source_is_refused(tmp_path, below, monkeypatch):
    base = save_base(tmp_path / "base", "gemma4", torch.bfloat16)
    before = sorted(base.rglob("*"))
    monkeypatch.chdir(base)
    for out in (base / below, below):
        with pytest.raises(ValueError, match="outside of"):
            quantize(base, out)
    assert sorted(base.rglob("*")) == before
