"""The guard and the optimiser's step behind a micro-batch: that a bad one changes nothing, waits of the host, time."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gpu_harness import Bench
from gpu_profile import waits
from gpu_training import attempt
from moeft.training.guards import NonFiniteGuard
from moeft.training.optim import HostAdamW, StochasticAdamW

STACKS = 8
"""A factors of experts' adapters: with their B factors a seventh of what an adapter on all experts trains."""


def run(bench: Bench) -> None:
    """Measure every optimiser that moeft names, and PyTorch's own default."""
    makers = {
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "adamw_torch": lambda p: torch.optim.AdamW(p, lr=1e-4),
        "adamw_moeft_stochastic": lambda p: StochasticAdamW(p, lr=1e-4),
        "adamw_moeft_host": lambda p: HostAdamW(p, lr=1e-4),
        "adamw_moeft_8bit": lambda p: HostAdamW(p, lr=1e-4, state_bits=8),
    }
    for name, make in makers.items():
        if not bench.is_late:
            attempt(bench, {"optimizer": name}, lambda make=make: _measure(bench, make), "guard")


def _measure(bench: Bench, make: Any) -> dict[str, Any]:
    s = bench.shapes
    shapes = [(s.experts * s.rank, s.hidden), (2 * s.inner, s.experts * s.rank)] * STACKS
    trained = [nn.Parameter(bench.randn(*shape, dtype=torch.float32)) for shape in shapes]
    gradients = [torch.full_like(p, 1e-3) for p in trained]
    optimizer, guard = make(trained), NonFiniteGuard(patience=9)
    args = SimpleNamespace(device=bench.device)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    good = torch.zeros((), device=bench.device)

    def step(loss: torch.Tensor = good) -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        guard.see_loss(loss, {})
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.step()
        guard.on_step_end(args, state, None)
        state.global_step += 1

    step()
    guard.settle(state)
    before = [p.detach().clone() for p in trained], copy.deepcopy(optimizer.state_dict()["state"])
    step(good / 0)
    gradients[-1][0, 0] = torch.inf
    step()
    gradients[-1][0, 0] = 1e-3
    guard.settle(state)
    after = [p.detach() for p in trained], optimizer.state_dict()["state"]
    if guard.skipped_steps != 2 or not _same(before, after):
        raise AssertionError(f"{guard.skipped_steps} bad steps of 2 were skipped, or one changed weights or state")
    found = waits(step) if bench.device.type == "cuda" else None
    seconds = bench.seconds(step)
    record = {"values": sum(p.numel() for p in trained), "seconds": seconds}
    return record if found is None else record | {"host_synchronisations": found.total(), "waits_at": dict(found)}


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two trees hold the same bits."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)
