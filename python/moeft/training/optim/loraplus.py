"""LoRA+: a higher learning rate for the B factors of LoRA.

Source: LoRA+, https://arxiv.org/abs/2402.12354
"""

from __future__ import annotations

import torch
from torch import nn


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Give B factors, and other vectors such as biases, ``ratio`` times the learning rate of their group.

    The same parameters as in ``peft.optimizers.create_loraplus_optimizer``, for any optimiser. Their groups follow
    those of the other parameters, so that the first group's rate stays that of A.

    Args:
        optimizer: An optimiser before its first step and before its scheduler was made.
        model: The model whose parameters it trains.
        ratio: Rate of B by rate of A.

    Raises:
        ValueError: If the model trains no B factor.
    """
    if not any("lora_B" in name and p.requires_grad for name, p in model.named_parameters()):
        raise ValueError("loraplus_lr_ratio is set, but the model trains no B factor of LoRA; add an adapter first")
    raised = {p for name, p in model.named_parameters() if "lora_B" in name or p.ndim == 1}
    for group in list(optimizer.param_groups):
        b_factors = [p for p in group["params"] if p in raised]
        if b_factors:
            group["params"] = [p for p in group["params"] if p not in raised]
            optimizer.add_param_group({**group, "params": b_factors, "lr": group["lr"] * ratio})
