"""Exports in one pass: an adapter merged while writing, and an interrupted export that goes on."""

import json
from pathlib import Path

import pytest
import torch

from moeft import _core, gguf
from moeft.errors import AdapterError, CheckpointError
from tests.interruption import KilledError
from tests.test_gguf_export import BASE, save_model
from tests.tiny_checkpoints import save_adapter, save_base


def blocks(path: Path) -> dict[str, bytes]:
    """Bytes of every tensor."""
    raw = path.read_bytes()
    return {t["name"]: raw[t["offset"] : t["offset"] + t["bytes"]] for t in gguf.read_header(path)["tensors"]}


@pytest.mark.parametrize(("family", "dtype"), [("gemma4", "bfloat16"), ("qwen3_moe", "float16"), ("llama", "bfloat16")])
def test_an_adapter_merged_while_writing_gives_the_blocks_of_the_merged_checkpoint(
    family: str, dtype: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", family, getattr(torch, dtype))
    options = {} if family != "llama" else {"target_parameters": None}
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    recipe = {"merge_method": "lora", "base_model": str(base), "models": [{"adapter": str(adapter)}]}
    _core.merge_checkpoint(json.dumps(recipe), str(tmp_path), str(tmp_path / "merged"))
    for kind in ("f32", "q8_0"):
        gguf.export(tmp_path / "merged", tmp_path / f"two-{kind}.gguf", type=kind)
        report = gguf.export(base, tmp_path / f"one-{kind}.gguf", type=kind, adapter=adapter, threads=2)
        assert blocks(Path(report.files[0])) == blocks(tmp_path / f"two-{kind}.gguf")
    gguf.export(base, tmp_path / "base.gguf", type="f32")
    assert blocks(tmp_path / "base.gguf") != blocks(tmp_path / "one-f32.gguf")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gemma4")
    save_base(tmp_path / "other", "olmoe", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(AdapterError, match="right base model"):
        gguf.export(base, tmp_path / "m.gguf", adapter=adapter)
    with pytest.raises(AdapterError, match="does not exist"):
        gguf.export(base, tmp_path / "m.gguf", adapter=tmp_path / "absent")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_killed_export_keeps_what_is_finished_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = gguf.export(BASE, tmp_path / "whole.gguf", type="q4_k_m", max_shard_bytes=1_000_000)
    seen: list[str] = []

    def die(done: int, total: int, what: str) -> None:
        seen.append(what)
        if done > total // 2:
            raise KilledError

    def again(progress=False) -> gguf.ExportReport:
        return gguf.export(BASE, tmp_path / "m.gguf", type="q4_k_m", max_shard_bytes=1_000_000, progress=progress)

    with pytest.raises(KilledError):
        again(die)
    assert not list(tmp_path.glob("m-*.gguf"))
    kept = [json.loads(line)["name"] for line in (tmp_path / "m.gguf.journal").read_text().splitlines()[1:]]
    assert 0 < len(kept) < len(whole.tensors)
    # A finished tensor that was damaged since, and a line that a kill cut off.
    first = next(tmp_path.glob("m-00001-*.partial"))
    raw = bytearray(first.read_bytes())
    raw[-40] ^= 1
    first.write_bytes(raw)
    with (tmp_path / "m.gguf.journal").open("a") as journal:
        journal.write('{"name": "blk.3')
    report = again()
    assert [Path(file).read_bytes() for file in report.files] == [Path(file).read_bytes() for file in whole.files]
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "m.gguf.journal").exists()


def test_an_export_with_other_options_starts_over(tmp_path: Path) -> None:
    def die(done: int, total: int, what: str) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        gguf.export(BASE, tmp_path / "m.gguf", type="q8_0", progress=die)
    gguf.export(BASE, tmp_path / "m.gguf", type="f16")
    gguf.export(BASE, tmp_path / "n.gguf", type="f16")
    assert blocks(tmp_path / "m.gguf") == blocks(tmp_path / "n.gguf")


def test_a_second_export_to_the_same_file_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    found = []

    def start_another(done: int, total: int, what: str) -> None:
        if not found:
            with pytest.raises(CheckpointError, match="another process"):
                gguf.export(BASE, tmp_path / "m.gguf", type="q8_0")
            found.append(what)

    gguf.export(BASE, tmp_path / "m.gguf", type="q8_0", progress=start_another)
    assert found
