"""AdamW whose state lives in host memory, in 32 or 8 bits, wherever the parameters are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moeft.kernels import adamw
from moeft.kernels.adamw import Moments
from moeft.training.optim.staging import Staging

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


class HostAdamW(torch.optim.Optimizer):
    """AdamW computed on the host; the moments never take memory of a GPU.

    Bytes of host memory per parameter: 8 with 32-bit state, 2.03 with 8-bit state; 4 more for a master copy. Every
    step gives the same bits on every CPU, so a run that resumes from ``state_dict`` equals one that did not stop.

    A master copy is a float32 weight that the step works on; the parameter is overwritten with it, rounded. Parameters
    on a device always have one; on the host, bfloat16 ones do unless ``master_weights`` is false. It is made at a
    parameter's first step: whoever assigns to the parameter later must make a new optimiser.

    Args:
        params: Parameters or groups of them, float32 or bfloat16, contiguous, with dense gradients. A group may set
            any of the arguments below.
        lr: Learning rate.
        betas: Decay of the mean of gradients and of the mean of their squares, each in [0, 1).
        eps: Added to the root of the corrected mean of squares.
        weight_decay: A weight loses this part of itself times ``lr``.
        state_bits: 32, or 8: block-wise codes of 256 values with one scale, as in bitsandbytes' ``AdamW8bit``.
        master_weights: Keep a float32 master copy of bfloat16 parameters on the host. Without it an update below
            1/512 of a weight is lost, and late in training many are.
        min_8bit_size: Parameters with fewer values keep 32-bit state, as in bitsandbytes.

    Raises:
        ValueError: If an argument is out of its range, or a parameter has another dtype or is not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        master_weights: bool = True,
        min_8bit_size: int = 4096,
    ) -> None:
        self._staging = Staging()
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "state_bits": state_bits,
                "master_weights": master_weights,
                "min_8bit_size": min_8bit_size,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer``."""
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in adamw.DTYPES:
                raise ValueError(f"a parameter is {param.dtype}, expected float32 or bfloat16")
            if not param.is_contiguous():
                raise ValueError(f"a parameter has strides {param.stride()}, expected a contiguous one")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step for every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: If a gradient is sparse, or an option of a group has left its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, param in work:
            _check_options(group)
            if param.grad.layout != torch.strided:
                raise ValueError(f"a gradient has layout {param.grad.layout}, expected a dense one: set sparse=False")
        gradients = self._staging.gradients([param for _, param in work])
        for (group, param), grad in zip(work, gradients, strict=True):
            self._step(group, param, grad)
        return loss

    def _step(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        if not state:
            state |= _initial_state(group, param)
        state["step"] += 1
        weight = state.get("master", param)
        on_host = param.device.type == "cpu"
        rounded = None
        if weight.dtype != param.dtype:
            rounded = param if on_host else self._staging.outgoing(param)
        adamw.step(
            weight,
            grad,
            Moments(*(state.get(name) for name in MOMENTS)),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
            rounded=rounded,
        )
        if on_host:
            torch.autograd.graph.increment_version(param)  # the core writes past autograd
        else:
            self._staging.send(weight if rounded is None else rounded, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._staging = Staging()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, bit for bit and into host memory.

        Raises:
            ValueError: If groups or shapes do not fit the parameters.
        """
        # torch would cast the state to the dtype of its parameter and move it to the parameter's device.
        super().load_state_dict({**state_dict, "state": {}})
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(ids, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = _loaded_state(state_dict["state"][index], param)


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not (math.isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} is {options[name]}, expected a finite number, not negative")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas is {options['betas']}, expected two numbers from 0 to below 1")
    if options["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits is {options['state_bits']!r}, expected 32 or 8")


def _initial_state(group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    bits = 32 if param.numel() < group["min_8bit_size"] else group["state_bits"]
    moments = {name: value for name, value in vars(Moments.zeros(param.shape, bits)).items() if value is not None}
    state: dict[str, Any] = {"step": 0, **moments}
    if param.device.type != "cpu" or (param.dtype == torch.bfloat16 and group["master_weights"]):
        wants_float32 = param.dtype == torch.float32 or group["master_weights"]
        state["master"] = param.detach().to("cpu", torch.float32 if wants_float32 else param.dtype, copy=True)
    return state


def _loaded_state(saved: dict[str, Any], param: Tensor) -> dict[str, Any]:
    state = {key: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for key, v in saved.items()}
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in state and state[name].shape != param.shape:
            raise ValueError(
                f"the saved {name} has shape {tuple(state[name].shape)}, its parameter {tuple(param.shape)}; "
                "is this the optimiser state of another model?"
            )
    return state
