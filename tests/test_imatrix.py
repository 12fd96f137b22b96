"""Importance matrices: against an own computation, read by llama.cpp's format elsewhere, used by the quantisers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import moeft
from moeft import gguf
from moeft.cli import main
from moeft.errors import CheckpointError, DataError
from moeft.gguf.block_check import check_blocks
from moeft.importance import squared_inputs
from moeft.integration import model_family
from moeft.kernels import nf4
from moeft.modules import NF4Experts
from tests.test_gguf_export import BASE, save_model

ROWS = [[2, 30, 41, 52, 63, 74], [2, 90, 91]]


def measured(model: Any) -> tuple[Any, gguf.WeightNames]:
    names = gguf.weight_names(model_family.of_model(model), (path for path, _ in model.named_modules()))
    return squared_inputs(model, list(names.linears), list(names.experts), ROWS), names


def stacks(module: Any) -> list[torch.Tensor]:
    """Dense stacks of an experts module, packed or not."""
    names = ("gate_up_proj", "down_proj")
    if isinstance(module, NF4Experts):
        return [nf4.dequantize(module.packed_weight(name), dtype=torch.float32) for name in names]
    return [getattr(module, name).detach().float() for name in names]


@pytest.mark.parametrize("packed", [False, True])
def test_sums_are_those_of_an_own_computation(packed: bool, tmp_path: Path) -> None:
    model, _ = moeft.load(BASE, moeft.NF4Config() if packed else None, dtype="float32")
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows: list[torch.Tensor] = []
    experts = model.get_submodule("model.layers.1.experts")
    hooks = [
        experts.register_forward_pre_hook(lambda _, args, kwargs: calls.append(args[:2]), with_kwargs=True),
        model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(
            lambda _, args: rows.append(args[0][0])
        ),
    ]
    found, _ = measured(model)
    for hook in hooks:
        hook.remove()
    x = torch.cat(rows).double()
    name = "model.layers.1.self_attn.q_proj"
    assert torch.allclose(found.sums[name][0], x.square().sum(0), rtol=1e-12)
    assert found.counts[name].tolist() == [sum(map(len, ROWS))]
    gate_up, down = stacks(experts)
    into_gate = torch.zeros(gate_up.shape[0], gate_up.shape[2], dtype=torch.float64)
    into_down = torch.zeros(down.shape[0], down.shape[2], dtype=torch.float64)
    counts = torch.zeros(len(down), dtype=torch.int64)
    for tokens, chosen in calls:
        for token, of_token in zip(tokens.float(), chosen, strict=True):
            for expert in of_token.tolist():
                gate, up = (gate_up[expert] @ token).chunk(2)
                into_gate[expert] += token.double().square()
                into_down[expert] += (functional.gelu(gate, approximate="tanh") * up).double().square()
                counts[expert] += 1
    assert torch.equal(found.counts["model.layers.1.experts.down_proj"], counts)
    assert torch.allclose(found.sums["model.layers.1.experts.gate_up_proj"], into_gate, rtol=1e-6)
    assert torch.allclose(found.sums["model.layers.1.experts.down_proj"], into_down, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma4", "gemma3", "qwen3_moe", "olmoe", "llama"])
def test_every_quantised_weight_of_a_layer_has_an_entry_of_its_shape(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", family)
    found, names = measured(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tensors = names.tensors()
    known = {name: tuple(found.sums[path].shape) for path in found.sums for name in tensors[path]}
    for tensor in gguf.plan(folder, type="q8_0").tensors:
        if tensor.name.startswith("blk.") and tensor.type != "f32":
            matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            assert known.pop(tensor.name) == (matrices, tensor.shape[-1])
    assert not known


def write(folder: Path, rows: int = 2) -> tuple[Path, gguf.ImportanceMatrix]:
    """The command's file for the embedded base, and its content."""
    (folder / "rows.jsonl").write_text('{"text": "restart web-3 now"}\n{"text": "why is the disk full?"}\n')
    with pytest.raises(SystemExit, match="0"):
        main(["imatrix", str(BASE), str(folder / "rows.jsonl"), str(folder / "im.gguf"), "-n", str(rows)])
    return folder / "im.gguf", gguf.read_imatrix(folder / "im.gguf")


def test_the_file_is_read_elsewhere_and_the_quantisers_use_it(tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf", reason="needs a reader of llama.cpp's file: pip install libgguf")
    path, matrix = write(tmp_path)
    assert matrix.unreached()  # Two short rows cannot reach all experts.
    means = matrix.means()
    theirs = libgguf.load_imatrix(path)
    assert theirs.keys() == means.keys()
    for name, of_name in theirs.items():
        reached = np.repeat(matrix.counts[name] > 0, means[name].shape[1])
        assert np.array_equal(of_name.reshape(-1)[reached], means[name].reshape(-1)[reached])
    gguf.export(BASE, tmp_path / "f32.gguf", type="f32")
    gguf.export(BASE, tmp_path / "plain.gguf", type="q4_k_m")
    report = gguf.export(BASE, tmp_path / "m.gguf", type="q4_k_m", imatrix=path, threads=2)
    assert [t.type for t in report.tensors] == [t.type for t in gguf.plan(BASE, type="q4_k_m").tensors]
    header = gguf.read_header(tmp_path / "m.gguf")
    assert dict(header["metadata"])["quantize.imatrix.entries_count"]["value"] == len(means)
    exact = (tmp_path / "f32.gguf", gguf.read_header(tmp_path / "f32.gguf")["tensors"])
    files = {tmp_path / "m.gguf": header["tensors"]}
    assert check_blocks(files, exact, means).different == ()
    # Without the weights the blocks are others, so the comparison can fail.
    assert len(check_blocks(files, exact).different) > 10


def test_what_is_no_matrix_of_this_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, matrix = write(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["imatrix", str(BASE), str(tmp_path / "rows.jsonl"), str(path)])
    assert "exists" in capsys.readouterr().err
    other = save_model(tmp_path / "other", "olmoe")
    with pytest.raises(CheckpointError, match=r"of another model|none of its tensors"):
        gguf.export(other, tmp_path / "m.gguf", imatrix=path)
    gguf.export(BASE, tmp_path / "q.gguf", type="q8_0")
    with pytest.raises(CheckpointError, match="imatrix"):
        gguf.export(BASE, tmp_path / "m.gguf", imatrix=tmp_path / "q.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="past the end"):
        gguf.export(BASE, tmp_path / "m.gguf", imatrix=tmp_path / "cut.gguf")
    name = "blk.0.attn_q.weight"
    nan = gguf.ImportanceMatrix({name: matrix.sums[name] * np.float32("nan")}, {name: matrix.counts[name]})
    gguf.write_imatrix(nan, tmp_path / "nan.gguf")
    with pytest.raises(CheckpointError, match=f"{name} has"):
        gguf.export(BASE, tmp_path / "m.gguf", imatrix=tmp_path / "nan.gguf")
    with pytest.raises(CheckpointError, match=f"{name} has"):
        gguf.read_imatrix(tmp_path / "nan.gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    with pytest.raises(DataError, match="no sequences"):
        squared_inputs(moeft.load(BASE, dtype="float32")[0], [], [], [])
