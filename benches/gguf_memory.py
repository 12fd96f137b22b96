"""Peak resident memory of an export of layers as large as those of Gemma 4 26B-A4B: plain, with adapter, with matrix.

    python benches/gguf_memory.py FOLDER --layers 1

The checkpoint is a sparse file of zeros, so it costs no disk; the adapter and the importance matrix hold random values,
so that weights are quantised that are not zero. Every export runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM

from gpu_harness import Shapes
from gpu_model import text_config
from moeft import gguf
from moeft.demo.run import BASE

RANK = 16
EXPORT = """
import resource, sys
from moeft import gguf
def peak():  # Not ru_maxrss, which a process has from the one that started it.
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
model, out, kind, adapter, imatrix = sys.argv[1:]
report = gguf.export(model, out, type=kind, adapter=adapter or None, imatrix=imatrix or None, threads=2)
used = resource.getrusage(resource.RUSAGE_SELF)
print(before // 1024, peak() // 1024, f"{used.ru_utime + used.ru_stime:.0f}", report.bytes)
"""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("folder", type=Path)
    words.add_argument("--layers", type=int, default=1)
    words.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    given = words.parse_args()
    model, adapter, matrix = (given.folder / name for name in ("model", "adapter", "imatrix.gguf"))
    shapes = save_sparse_checkpoint(model, given.layers)
    save_adapter(adapter, shapes)
    matrix.unlink(missing_ok=True)
    save_matrix(matrix, model)
    size = sum(int(np.prod(shape)) for shape in shapes.values()) * 2
    print(f"{given.layers} layers and the embedding of Gemma 4 26B-A4B, {size:,} bytes in bfloat16, 2 threads")
    print("| type | with | MiB before | MiB at most | CPU seconds | bytes written |\n|---|---|---:|---:|---:|---:|")
    for kind in given.types:
        for name, words_of in {
            "": ["", ""],
            "adapter": [str(adapter), ""],
            "adapter and matrix": [str(adapter), str(matrix)],
        }.items():
            out = given.folder / "out.gguf"
            command = [sys.executable, "-c", EXPORT, str(model), str(out), kind, *words_of]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"| {kind} | {name} | {' | '.join(ran.stdout.split())} |", flush=True)
            out.unlink()


def save_sparse_checkpoint(folder: Path, layers: int) -> dict[str, tuple[int, ...]]:
    """Headers and a hole; gives the shapes of all tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    config = text_config(Shapes(layers=layers))
    config.dtype = torch.bfloat16
    config.architectures = ["Gemma4ForCausalLM"]
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    config.save_pretrained(folder)
    for file in BASE.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items() if name != "lm_head.weight"}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return shapes


def save_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random factors of all stacks of experts, as PEFT lays them out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    factors = {}
    for name, shape in shapes.items():
        module, _, stack = name.rpartition(".")
        if len(shape) == 3 and module.endswith(".experts"):
            key = f"base_model.model.{module}{'.base_layer' if stack == 'gate_up_proj' else ''}"
            factors[f"{key}.lora_A.weight"] = torch.randn(shape[0] * RANK, shape[2]) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(shape[1], RANK * shape[0]) * 0.02
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [], "target_parameters": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.21.2"}))


def save_matrix(out: Path, model: Path) -> None:
    """Random importance of every column of the tensors of all layers."""
    rng = np.random.default_rng(0)
    tensors = [
        tensor for tensor in gguf.plan(model).tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    ]
    experts = {tensor.name: tensor.shape[0] if len(tensor.shape) == 3 else 1 for tensor in tensors}
    sums = {t.name: rng.random((experts[t.name], t.shape[-1]), np.float32) + 0.1 for t in tensors}
    counts = {name: np.ones(number, np.float32) for name, number in experts.items()}
    gguf.write_imatrix(gguf.ImportanceMatrix(sums, counts), out)


if __name__ == "__main__":
    main()
