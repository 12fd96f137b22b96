"""Triton's kernels where there is no GPU: run by its interpreter, and compiled for GPUs down to machine code."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeft.kernels import dispatch
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear import gpu as grouped
from tests import meta_launches

triton = pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux: pip install triton")
triton_targets = importlib.import_module("tests.triton_targets")

HERE = Path(__file__).parent
BUDGET = HERE / "vectors" / "triton_instructions.json"
MOST_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that a program may have
PRODUCTS = ("grouped_linear_kernel", "gated_linear_kernel", "grouped_outer_kernel")


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 takes no bounds of a range from tensors under NumPy 2.4: numpy<2.4 has them",
)
def test_kernels_equal_their_definitions_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOEFT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    file = HERE / "triton_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(file)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def launches(capability: int, tokens: int, only: str = "") -> list[tuple[int, triton_targets.LaunchRecord]]:
    """Every launch of a layer and, without ``only``, of routing and loss head; else those whose name has it."""

    def call() -> None:
        meta_launches.expert_block(tokens)
        if not only:
            meta_launches.route(tokens)
            meta_launches.loss_head(tokens)
            meta_launches.restore()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "capability_of", lambda _: divmod(capability, 10))
        records = triton_targets.launches(call)
    return [(capability, record) for record in records if only in record.name]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the launches compile to, by capability and name: decoding products everywhere, the rest where it differs."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    wanted = launches(86, 512)
    wanted += launches(86, 4096, "-packed") + launches(90, 128, "-packed")
    for capability in (80, 89, 120):
        wanted += launches(capability, 512, "linear_kernel-packed")
    for capability in (86, 90):
        wanted += launches(capability, 16384, "M=128,N=64")
    by_name = {(capability, record.name): record for capability, record in reversed(wanted)}
    # One after the other: Python 3.11 cannot parse in two threads at once.
    results = {key: triton_targets.compile_for(record, key[0]) for key, record in by_name.items()}
    del os.environ["TRITON_CACHE_DIR"]
    return results


@pytest.mark.slow
def test_programs_fit_the_shared_memory_of_their_gpu(compiled):
    assert {capability for capability, _ in compiled} == set(MOST_SHARED)
    too_large = {
        key: code.shared_bytes for key, code in compiled.items() if code.shared_bytes > MOST_SHARED[key[0]] << 10
    }
    assert not too_large


@pytest.mark.slow
def test_no_program_spills_registers(compiled):
    assert not {key: code.stack_bytes for key, code in compiled.items() if code.stack_bytes}


@pytest.mark.slow
def test_products_use_matrix_instructions(compiled):
    products = {key: code.has_mma for key, code in compiled.items() if key[1].startswith(PRODUCTS)}
    assert products
    assert all(products.values()), [key for key, has_mma in products.items() if not has_mma]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rank", "only"),
    [
        (torch.float32, 16, "linear_kernel[ROWS=2816,COLUMNS=704,TRANSPOSE=0"),
        (torch.float32, 16, "gated"),
        (torch.bfloat16, 512, "gated"),
    ],
    ids=str,
)
def test_exact_rows_and_large_ranks_fit_the_smallest_gpu(monkeypatch, dtype, rank, only):
    monkeypatch.setattr(config, "capability_of", lambda _: (8, 6))
    block = functools.partial(meta_launches.expert_block, 16384, dtype, rank)
    (record,) = (record for record in triton_targets.launches(block) if only in record.name)
    code = triton_targets.compile_for(record, 86)
    assert code.shared_bytes <= MOST_SHARED[86] << 10
    assert code.stack_bytes <= 8  # outside the loop


@pytest.mark.slow
def test_restoring_a_weight_reads_a_scale_once_for_a_run_of_values(compiled):
    (code,) = (code for (capability, name), code in compiled.items() if capability == 86 and "dequantize" in name)
    # Of 32 values a thread: codes, table and offset, and three loads for a scale. Triton 3.6 gives a thread four runs.
    runs = 4 if triton.__version__.startswith("3.6.") else 1
    assert code.ptx.count("ld.global") == 3 + 3 * runs


@pytest.mark.slow
def test_logit_of_the_label_is_read_before_a_warp_that_is_ahead_can_overwrite_it(compiled):
    ptx = compiled[86, "log_probs_kernel[]"].ptx
    assert ptx.count("ld.global.b16") == 1  # other logits come four or more at a time
    assert ptx.index("ld.global.b16") < ptx.rindex("bar.sync") < ptx.rindex("st.global")


@pytest.mark.slow
def test_main_loops_stay_in_their_instruction_budget(compiled):
    """The budgets are what Triton 3.9 compiles to and a tenth more: decoding must hide behind the matrix units."""
    budget = json.loads(BUDGET.read_text("utf-8"))
    found = {f"sm_{capability} {name}": code.loop_instructions for (capability, name), code in compiled.items()}
    missing = [key for key in budget if key not in found]
    assert not missing
    over = {key: (found[key], most) for key, most in budget.items() if found[key] > most}
    assert not over


class OperationCount(TorchDispatchMode):
    """PyTorch's operations that launch something."""

    NOTHING = ("view", "empty", "permute", "slice", "transpose", "detach", "expand", "unsqueeze", "select.int")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function).removeprefix("aten.")
        if name != "t.default" and not any(part in name for part in self.NOTHING):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("capability", "gib", "tokens", "launches"),
    [((8, 6), 24, 4096, 30), ((8, 6), 24, 16384, 58), ((8, 0), 80, 16384, 38), ((9, 0), 141, 16384, 43)],
    ids=["decoding products", "RTX 3090", "A100", "H200"],
)
def test_layer_of_experts_takes_at_most_sixty_launches(monkeypatch, capability, gib, tokens, launches):
    """Routing, forward and backward with float32 factors on both stacks."""
    monkeypatch.setattr(config, "capability_of", lambda _: capability)
    monkeypatch.setattr(config, "workspace_bytes", lambda _: config.share_of(gib << 30))
    kernels = []
    with triton_targets.counted(kernels):
        meta_launches.expert_block(tokens)  # constants are made once
        kernels.clear()
        with OperationCount() as operations:
            meta_launches.route(tokens)
            meta_launches.expert_block(tokens)
    assert len(kernels) + len(operations.names) == launches <= 60, (kernels, operations.names)


def test_chunks_are_even_and_fit_the_workspace(monkeypatch):
    monkeypatch.setattr(config, "workspace_bytes", lambda _: config.share_of(24 << 30))
    weight = meta_launches.packed(128, 1408, 2816)
    with triton_targets.counted([]):
        chunks = [(first, stop) for first, stop, _ in grouped.chunks(weight, "workspace", torch.bfloat16)]
    assert chunks == [(0, 26), (26, 52), (52, 78), (78, 104), (104, 128)]
    assert config.share_of(24 << 30) >= 26 * 1408 * 2816 * 2


def test_triton_on_a_gpu_that_is_too_old_is_said_once_and_not_used(monkeypatch, caplog):
    dispatch._find_obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    device = torch.device("cuda", 0)
    assert not dispatch.has_triton(device)
    assert not dispatch.has_triton(device)
    assert caplog.text.count("Tesla T4 is sm_75, and Triton's kernels need sm_80 or newer") == 1
    monkeypatch.setenv("MOEFT_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"MOEFT_KERNELS is 'triton', but Tesla T4 is sm_75"):
        dispatch.has_triton(device)
    dispatch._find_obstacle.cache_clear()


def test_missing_triton_falls_back_to_pytorch(monkeypatch, caplog):
    dispatch._find_obstacle.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    assert not dispatch.has_triton(torch.device("cuda", 0))
    assert "the package triton is not installed" in caplog.text
    dispatch._find_obstacle.cache_clear()


def test_import_of_the_kernels_does_not_load_triton():
    code = "import sys, moeft.kernels; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_workspace_is_bounded_by_its_variable(monkeypatch):
    config.workspace_bytes.cache_clear()
    monkeypatch.setenv("MOEFT_WORKSPACE_MIB", "96")
    assert config.workspace_bytes(torch.device("meta")) == 96 << 20
    config.workspace_bytes.cache_clear()
    monkeypatch.setenv("MOEFT_WORKSPACE_MIB", "a lot")
    with pytest.raises(ValueError, match=r"MOEFT_WORKSPACE_MIB is 'a lot', expected a positive number of mebibytes"):
        config.workspace_bytes(torch.device("meta"))


# GeForce cards decode inside the product; sm_90 and sm_100 read a restored stack, by PyTorch if it fits the workspace.
@pytest.mark.parametrize(
    ("capability", "tokens", "path"),
    [
        ((8, 6), 4096, "fused"),
        ((8, 6), 8192, "workspace"),
        ((8, 0), 4096, "workspace"),
        ((12, 0), 4096, "fused"),
        ((9, 0), 128, "fused"),
        ((9, 0), 4096, "grouped_mm"),
        ((10, 0), 4096, "grouped_mm"),
    ],
)
def test_way_through_a_stack_depends_on_gpu_and_rows(monkeypatch, capability, tokens, path):
    monkeypatch.setattr(config, "capability_of", lambda _: capability)
    monkeypatch.setattr(config, "workspace_bytes", lambda _: 2 << 30)
    weight = meta_launches.packed(128, 1408, 2816)
    assert config.path_of_weight(weight, tokens * 8, meta_launches.empty(1, 2816)) == path
    monkeypatch.setattr(config, "workspace_bytes", lambda _: 64 << 20)
    assert config.path_of_weight(weight, tokens * 8, meta_launches.empty(1, 2816)) != "grouped_mm"


def test_compiler_asks_which_kernels_a_gpu_has_without_a_graph_break(monkeypatch):
    dispatch._find_obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))

    def add(x):
        return x + dispatch.has_triton(torch.device("cuda", 0))

    torch._dynamo.reset()
    assert torch.compile(add, backend="eager", fullgraph=True)(torch.ones(1)) == 2
    dispatch._find_obstacle.cache_clear()


def test_chunks_of_experts_share_a_compiled_kernel(monkeypatch):
    monkeypatch.setattr(config, "capability_of", lambda _: (8, 0))
    monkeypatch.setattr(config, "workspace_bytes", lambda _: 192 << 20)  # 22 experts of gate_up, 43 of down
    records = triton_targets.launches(lambda: meta_launches.expert_block(4096))
    names = [record.name for record in records if "linear_kernel" in record.name]
    assert len(names) == len(set(names)) > 4
