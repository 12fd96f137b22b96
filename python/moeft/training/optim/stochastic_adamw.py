"""AdamW on 16-bit weights without a master copy: each new weight is rounded up or down at random, right on average.

Source: Gupta et al., Deep Learning with Limited Numerical Precision, https://arxiv.org/abs/1502.02551
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

DROPPED_BITS = 16
"""Bits of a float32 that a bfloat16 lacks."""


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 values, so that the expectation is the value itself.

    A value that bfloat16 holds exactly stays, and so do infinities and NaN.

    Args:
        value: Float32, of any shape.
        generator: Source of randomness, on the device of ``value``.

    Returns:
        bfloat16 of the same shape.
    """
    noise = torch.randint(
        0, 1 << DROPPED_BITS, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    # Floats of one sign are ordered as their bits are, so a carry out of the dropped bits is the next bfloat16.
    bits = (value.view(torch.int32) + noise) & ~((1 << DROPPED_BITS) - 1)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(torch.isfinite(value), rounded, value.to(torch.bfloat16))


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments that steps in float32 and rounds bfloat16 weights stochastically.

    Rounding to nearest loses every update below 1/512 of a weight; here it is taken with the probability that makes
    the expectation right. 10 bytes per bfloat16 weight where a master copy makes it 14. Float32 weights step as usual.

    The randomness depends on seed, step and parameter alone: a run that resumes equals one that did not stop, and
    replicas of a weight in several processes stay equal.

    Attributes:
        found_inf: As ``torch.amp.GradScaler`` sets it: a float32 scalar on the device, 1 if the coming steps are to
            change nothing. The counts of steps lie on the host, so whoever sets it calls :meth:`forget_step` later.

    Args:
        params: Parameters or groups of them, float32 or bfloat16.
        lr: Learning rate.
        betas: Decay of the mean of gradients and of the mean of their squares.
        eps: Added to the root of the corrected mean of squares.
        weight_decay: A weight loses this part of itself times ``lr``.
        seed: Of the rounding.

    Raises:
        ValueError: If a parameter has another dtype.
    """

    found_inf: Tensor | None = None
    _stepped: tuple[Tensor, ...] = ()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"a parameter is {param.dtype}, expected float32 or bfloat16")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step for every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = enumerate(((group, p) for group in self.param_groups for p in group["params"]), 1)
        work = [(index, group, param) for index, (group, param) in numbered if param.grad is not None]
        for index, group, param in work:
            self._step(group, param, index)
        self._stepped = tuple(param for _, _, param in work)
        return loss

    def forget_step(self) -> None:
        """Count the last step, which ``found_inf`` made void, as none; before the next one or a ``state_dict``."""
        for param in self._stepped:
            self.state[param]["step"] -= 1
        self._stepped = ()

    def _step(self, group: dict[str, Any], param: Tensor, index: int) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), step, grad = group["betas"], state["step"], param.grad.float()  # type: ignore[union-attr]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        # A product with zero would keep NaN.
        before = [] if self.found_inf is None else [t.clone() for t in (mean, square, param)]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight = param.float() if param.dtype == torch.bfloat16 else param
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, scale, value=-float(group["lr"]) / (1 - beta1**step))
        if weight is not param:
            generator = torch.Generator(param.device)
            generator.manual_seed(((group["seed"] * 1_000_003 + step) * 1_000_003 + index) % (1 << 63))
            param.copy_(round_stochastically(weight, generator))
        if self.found_inf is not None:
            is_void = self.found_inf.to(param.device) > 0
            for changed, old in zip((mean, square, param), before, strict=True):
                torch.where(is_void, old, changed, out=changed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the moments stay float32, where torch would round them as the weights."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in self.state[param]:
                        self.state[param][name] = state_dict["state"][index][name].to(param.device, copy=True)
