"""Training steps of the whole model, all of it on the GPU: time and memory by length, checkpointing and adapter."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

import gpu_model
from gpu_harness import Bench
from gpu_memory import memory_cap
from gpu_profile import profile
from gpu_training import attempt, prepare, steps
from moeft.integration.checkpointing import apply_checkpointing


class Setting(NamedTuple):
    """One model and how it is trained."""

    name: str
    sequences: tuple[tuple[int, int], ...]  # sequences of a step, tokens of each
    packed_experts: bool = True
    packed_rest: bool = True
    train_experts: bool = True
    policies: tuple[str, ...] = ("full",)
    caps_gib: tuple[int, ...] = ()


def settings(bench: Bench) -> list[Setting]:
    """What the issue of speed and memory asks for, most telling first."""
    s = bench.shapes
    longest, packed = s.sequences[-1], s.packed_sequences
    return [
        Setting("nf4, attention and experts", ((packed, longest), (1, longest)), caps_gib=(24,)),
        Setting(
            "nf4, attention",
            tuple((1, length) for length in s.sequences),
            train_experts=False,
            policies=("full", "keep_norm_inputs", "none"),
            caps_gib=(16,),
        ),
        Setting("bf16 experts, attention and experts", ((packed, longest),), packed_experts=False),
    ]


def run(bench: Bench) -> None:
    """Build each model once, and time its steps."""
    for setting in settings(bench):
        if bench.is_late:
            bench.write("model", setting=setting.name, skipped="no time left")
            continue
        with bench.section(f"model: {setting.name}"):
            _measure(bench, setting)


def _measure(bench: Bench, setting: Setting) -> None:
    start = time.perf_counter()
    base = gpu_model.build(bench, packed_experts=setting.packed_experts, packed_rest=setting.packed_rest)
    unset = gpu_model.unset_buffers(base)
    if unset:
        raise RuntimeError(f"buffers without numbers: {unset[:5]}")
    model = prepare(bench, base, setting.train_experts)
    trained = [p for p in model.parameters() if p.requires_grad]
    bench.write(
        "model",
        setting=setting.name,
        build_seconds=time.perf_counter() - start,
        resident_bytes=_allocated(bench),
        trained_parameters=sum(p.numel() for p in trained),
    )
    for policy in setting.policies:
        apply_checkpointing(base, policy)
        for sequences, length in setting.sequences:
            if bench.is_late:
                return
            record = {"setting": setting.name, "policy": policy, "sequences": sequences, "length": length}
            attempt(bench, record, lambda s=sequences, n=length: steps(bench, model, trained, s, n))
    apply_checkpointing(base, "full")
    sequences, length = setting.sequences[-1]
    for cap in setting.caps_gib:
        record = {"setting": setting.name, "cap_gib": cap, "sequences": sequences, "length": length}
        with memory_cap(bench, cap):
            attempt(bench, record, lambda: steps(bench, model, trained, sequences, length, rounds=1))
    record = {"setting": setting.name, "sequences": sequences, "length": length}
    attempt(bench, record, lambda: profile(bench, model, trained, sequences, length), "profile")


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
