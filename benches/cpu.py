"""Time the CPU kernels beside their peers, one thread, interleaved; correctness first.

usage: python benches/cpu.py [--out FILE.jsonl] [--rounds N]
Peers: bitsandbytes (NF4), torch.sort (routing), PEFT target_parameters (expert LoRA). The limit is a copy of the same
bytes by torch, measured in the same rounds.
"""

from __future__ import annotations

import os

# Read once, when the Rust core starts its first thread.
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moeft.integration import peft_lora
from moeft.kernels import nf4, routing
from moeft.modules import NF4Experts

EXPERTS, ROWS, COLUMNS = 16, 1408, 2816  # a slice of one gate_up stack of Gemma-4 26B-A4B


def interleaved(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each subject; every round runs all of them once."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_number in range(rounds + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject()
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_nf4(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Elements per second of quantise and dequantise."""
    w = torch.randn(EXPERTS, ROWS, COLUMNS).mul_(0.02).to(dtype)
    flat, out, target = w.view(-1, COLUMNS), torch.empty_like(w), torch.empty_like(w)
    ours, (packed, state) = nf4.quantize(w), quantize_4bit(flat, quant_type="nf4", blocksize=64)
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    assert torch.equal(nf4.dequantize(ours, out=out).view(flat.shape), dequantize_4bit(packed, state))
    seconds = interleaved(
        {
            "quantise, moeft": lambda: nf4.quantize(w),
            "quantise, bitsandbytes": lambda: quantize_4bit(flat, quant_type="nf4", blocksize=64),
            "dequantise into a buffer, moeft": lambda: nf4.dequantize(ours, out=out),
            "dequantise, bitsandbytes": lambda: dequantize_4bit(packed, state),
            "limit: copy of the 16- or 32-bit side": lambda: target.copy_(w),
        },
        rounds,
    )
    return {name: w.numel() / value for name, value in seconds.items()}


def bench_routing(tokens: int, rounds: int) -> dict[str, float]:
    """Routed rows per second, 8 of 128 experts."""
    index = torch.rand(tokens, 128).topk(8).indices
    assert torch.equal(routing.bucket(index, 128).permutation, routing.reference.bucket(index.flatten(), 128)[0])
    seconds = interleaved(
        {
            "routing, moeft": lambda: routing.bucket(index, 128),
            "routing, torch stable argsort": lambda: routing.reference.bucket(index.flatten(), 128),
        },
        rounds,
    )
    return {name: index.numel() / value for name, value in seconds.items()}


def bench_expert_block(rounds: int) -> dict[str, float]:
    """Tokens per second, forward and backward with LoRA r8: H 512, E 64, top 8, I 256, T 512, float32."""
    tokens, hidden, inner, num_experts, top_k = 512, 512, 256, 64, 8
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    dense = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
    packed = NF4Experts(
        dense["experts"].gate_up_proj.shape, dense["experts"].down_proj.shape, ACT2FN["silu"], 64, False
    )
    for name in packed.packed_shapes:
        weight = nf4.quantize(getattr(dense["experts"], name))
        setattr(packed, name, nn.Parameter(weight.packed, requires_grad=False))
        setattr(packed, name + "_absmax", weight.absmax)
        getattr(dense["experts"], name).data.copy_(nf4.dequantize(weight, dtype=torch.float32))
    peft_lora.install()
    lora = LoraConfig(r=8, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    frozen = copy.deepcopy(dense["experts"]).requires_grad_(False)
    theirs = get_peft_model(dense, lora).base_model.model["experts"]
    ours = get_peft_model(nn.ModuleDict({"experts": packed}), copy.deepcopy(lora)).base_model.model["experts"]
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" in k}, strict=False)
    x = torch.randn(tokens, hidden, requires_grad=True)
    index, weights = torch.rand(tokens, num_experts).topk(top_k).indices, torch.rand(tokens, top_k)
    torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights), rtol=1e-4, atol=1e-4)
    seconds = interleaved(
        {
            "expert block with LoRA, moeft on NF4": lambda: ours(x, index, weights).sum().backward(),
            "expert block with LoRA, PEFT on float32": lambda: theirs(x, index, weights).sum().backward(),
            "expert block without LoRA, transformers on float32": lambda: frozen(x, index, weights).sum().backward(),
        },
        rounds,
    )
    return {name: tokens / value for name, value in seconds.items()}


def cpu_model() -> str:
    """Name of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {
        "NF4 bf16, elements/s": bench_nf4(torch.bfloat16, arguments.rounds),
        "NF4 f32, elements/s": bench_nf4(torch.float32, arguments.rounds),
        "T 4096, rows/s": bench_routing(4096, arguments.rounds),
        "tokens/s": bench_expert_block(arguments.rounds),
    }
    machine = {
        "cpu": cpu_model(),
        "threads": 1,
        **{name: metadata.version(name) for name in ("torch", "bitsandbytes", "peft", "transformers", "moeft")},
    }
    print(machine)
    for unit, figures in results.items():
        for name, value in figures.items():
            print(f"{unit:<22}{name:<52}{value:>16,.0f}")
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"unit": unit, "what": name, "value": value, **machine}) + "\n")


if __name__ == "__main__":
    main()
