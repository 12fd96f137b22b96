"""The bench of the GPU path, where there is no GPU: every line of it runs, and one failure does not end the file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux: pip install triton")
BENCHES = Path(__file__).parent.parent / "benches"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A bench of tiny shapes that writes to ``tmp_path``, with its modules importable."""
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_harness

    return gpu_harness.Bench(gpu_harness.TINY, tmp_path / "found.jsonl", 600)


def lines(bench):
    return [json.loads(line) for line in bench.out.read_text("utf-8").splitlines()]


def test_what_fails_is_written_and_the_next_measurement_runs(bench):
    import gpu_training

    def fail(error):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        gpu_training.attempt(bench, {"setting": "a"}, lambda e=error: fail(e))
    gpu_training.attempt(bench, {"setting": "b"}, lambda: {"seconds": 1.0})
    first, second, third = lines(bench)
    assert first["out_of_memory"] == "CUDA out of memory"
    assert second["error"] == "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED"
    assert third == {"section": "step", "setting": "b", "seconds": 1.0}
    assert bench.failed == ["step {'setting': 'a'}"]  # memory that is not there is a finding


def test_step_that_runs_out_of_memory_keeps_no_gradients(bench):
    import gpu_training

    weight = torch.nn.Parameter(torch.ones(2))

    class Model(torch.nn.Module):
        def forward(self, **_):
            if weight.grad is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            weight.grad = torch.ones(2)
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gpu_training.steps(bench, Model(), [weight], 1, 4)
    assert weight.grad is None


def test_wrong_kernel_does_not_hide_the_others(bench, monkeypatch):
    import gpu_correctness

    def refuse():
        raise RuntimeError("PassManager::run failed")

    checks = [("bits of a", lambda: 0.0), ("b", refuse), ("c", lambda: 1.0), ("d", lambda: 1e-9)]
    monkeypatch.setattr(gpu_correctness, "_checks", lambda bench: iter(checks))
    assert not gpu_correctness.run(bench)
    assert [line["passed"] for line in lines(bench)] == [True, False, False, True]


def test_smaller_card_has_a_smaller_workspace(bench, monkeypatch):
    import gpu_memory
    from moeft.kernels.grouped_linear import config

    monkeypatch.delenv(config.WORKSPACE_VARIABLE, raising=False)
    usual = config.workspace_bytes(bench.device)
    with gpu_memory.memory_cap(bench, 24):
        assert config.workspace_bytes(bench.device) == 204 << 20
    assert config.workspace_bytes(bench.device) == usual


@pytest.fixture
def counted_step(monkeypatch):
    """Runs a checkpointed step on four packs, with factors on attention and all experts, on the meta device."""
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_meta

    def step(capability, gib, layers, stock_norms=False):
        options = {"sequences": 4, "length": 4096, "attention_only": False, "stock_norms": stock_norms}
        with gpu_meta.as_on_a_gpu(capability, gib << 30) as allocations:
            return gpu_meta.step(allocations, layers, "full", argparse.Namespace(**options))

    return step


DEPRECATED = "ignore:.device. is deprecated:FutureWarning"  # of a rotary embedding, from transformers 5.17 to 5.18


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize(("capability", "gib"), [((8, 6), 24), ((9, 0), 141)], ids=["RTX 3090", "H200"])
def test_step_on_four_packs_of_the_26b_model_peaks_below_24_gb(counted_step, capability, gib):
    found = counted_step(capability, gib, layers=30)
    assert 15e9 < found["resident_bytes"] < found["peak_bytes"] < 24e9


@pytest.mark.filterwarnings(DEPRECATED)
def test_fused_norms_keep_no_float32_copies_and_are_a_few_launches(counted_step):
    fused, stock = (counted_step((9, 0), 141, 3, stock_norms) for stock_norms in (False, True))
    # Of 16,384 tokens, eight norms of hidden states and those of heads; six inputs stay in 16 bits instead.
    assert stock["peak_bytes"] - fused["peak_bytes"] > 1.1e9
    assert fused["launches"] < 0.55 * stock["launches"]


def test_tables_take_a_file_with_failures(bench):
    import gpu_table

    records = [
        {"section": "correctness", "kernel": "a", "passed": False, "error": "RuntimeError: b", "trace": "..."},
        {"section": "correctness", "kernel": "c", "passed": False, "relative_error": 0.5},
        {"section": "limits", "error": "RuntimeError: d"},
        {"section": "step", "setting": "nf4", "sequences": 1, "length": 8, "out_of_memory": "CUDA out of memory"},
        {"section": "streaming", "adapter": ["attention"], "skipped": "no time left"},
        {"section": "stopped", "reason": "no time left for thin"},
        {"section": "launches", "what": "routing and experts of a layer", "packed": True, "launches": 41},
    ]
    text = gpu_table.tables(records)
    assert "| nf4 | full | 1 x 8 | out of memory |" in text
    assert "not measured: correctness" in text
    assert "**wrong: c, relative error 0.5**" in text
    assert "no time left for thin" in text
    assert "(goal 60): 41 with NF4 experts." in text


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 takes no bounds of a range from tensors under NumPy 2.4: numpy<2.4 has them",
)
def test_whole_bench_runs_at_tiny_sizes_and_its_file_fills_every_table(tmp_path, monkeypatch):
    out = tmp_path / "found.jsonl"

    def run(*options, **variables):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, str(BENCHES / "gpu.py"), "--tiny", "--out", str(out), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    kernels = ("limits", "restoring", "products", "tuning", "attention", "loss_head", "norms", "thin", "routes")
    run("--only", *kernels, TRITON_INTERPRET="1", MOEFT_KERNELS="triton")
    run("--unchecked", "--only", "model", "streaming")  # by the core, since the interpreter takes a minute
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert not [record for record in records if record.keys() & {"error", "skipped", "out_of_memory"}]
    assert {record["passed"] for record in records if record["section"] == "correctness"} == {True}
    streamed = [r for r in records if r["section"] == "streaming" and "resident_seconds" in r]
    alone = [r for r in records if r["section"] == "streaming" and "resident_seconds" not in r]
    loss = {(r["adapter"], r["sequences"]): r["loss"] for r in alone}
    assert {r.get("cap_gib") for r in streamed} == {12, 16, None}
    assert all(r["loss"] == loss[r["adapter"], r["sequences"]] for r in streamed)
    losses = [r["losses"] for r in records if r["section"] == "optimizer"]
    assert len(losses) == 2
    assert all(found[-1] < found[0] for found in losses)
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_table

    text = gpu_table.tables(records)
    for title in (
        "Limits of the machine",
        "Norms, GB/s",
        "Restoring NF4",
        "gate/up of all experts",
        "Attention of a layer",
        "Training steps",
        "A step, forward",
    ):
        assert title in text
    assert "Streamed experts" in text
    assert "AdamW on the host" in text
