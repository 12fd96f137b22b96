"""What a fused experts module of transformers v5 computes: read from its attributes, checked against what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeft import families
from moeft.errors import UnsupportedModelError
from moeft.kernels import Activation, ClampedSwiglu, ExpertLayout
from moeft.kernels.experts.spec import activate
from moeft.modules.nf4_experts import BIASES, STACKS

# Flags that transformers' `use_experts_implementation` sets, and their values in a release that lacks one.
FLAGS = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}
PROBE_RANGE = 12.0  # beyond the limit of gpt-oss, 7
PROBE_ROWS = 8
PROBE_COLUMNS = 64


@dataclass(frozen=True)
class ExpertsModule:
    """How an experts module is built.

    Attributes:
        layout: How the stacks are stored.
        activation: What turns gate and up into the input of the down projection.
        biased: Whether the stacks have biases.
    """

    layout: ExpertLayout
    activation: Activation
    biased: bool


def is_fused(module: nn.Module) -> bool:
    """Whether a module is made by transformers to hold fused experts."""
    return hasattr(module, "_apply_gate") and all(isinstance(getattr(module, name, None), Tensor) for name in STACKS)


def read(name: str, module: nn.Module, family: families.Family | None = None) -> ExpertsModule:
    """Read an experts module.

    Args:
        name: Its name, for messages.
        module: The module, possibly on the meta device.
        family: What it must agree with.

    Raises:
        UnsupportedModelError: If it computes something else than gate, up, activation and down, if its attributes and
            what it computes differ, or if it differs from its family's file.
    """
    where = f"{name} ({type(module).__name__})"
    if not is_fused(module):
        raise UnsupportedModelError(
            f"{where} does not hold gate_up_proj, down_proj and _apply_gate, as fused experts of transformers v5 do; "
            "this layout of experts is not supported"
        )
    flags = {flag: getattr(module, flag, default) for flag, default in FLAGS.items()}
    unknown = [n for n, v in vars(module).items() if n.startswith(("is_", "has_")) and n not in FLAGS and v]
    if not flags["has_gate"] or flags["has_post_expert_norm"] or unknown:
        raise UnsupportedModelError(
            f"{where} has the flags {flags}{f' and {unknown}' if unknown else ''}; experts without a gate, with a norm "
            "after each or with unknown flags are not supported, load the model with NF4Config(experts=False, ...)"
        )
    biased = bool(flags["has_bias"])
    layout = ExpertLayout(bool(flags["is_transposed"]), not flags["is_concatenated"])
    _check_parameters(where, module, layout, biased)
    if family is not None:
        _check_family(where, family, families.StackLayout(*layout, biased))
    return ExpertsModule(layout, _activation(where, module, layout), biased)


def biases(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The biases of an experts module by the name that the kernel gives them; None if it has none."""
    return {name.replace("_proj", ""): getattr(module, name, None) for name in BIASES}


def _check_parameters(where: str, module: Any, layout: ExpertLayout, biased: bool) -> None:
    expected = {*STACKS, *(BIASES if biased else ())}
    found = {name for name, _ in module.named_parameters()} or expected
    # A parametrised stack, as while PEFT adds its delta, is no parameter of the module itself.
    if unknown := {n for n in found if not n.startswith("parametrizations.")} - expected:
        raise UnsupportedModelError(
            f"{where} has parameters {sorted(unknown)} beside {sorted(expected)}: not supported"
        )
    gate_up, down = (tuple(getattr(module, stack).shape) for stack in STACKS)
    if len(down) != 3 or gate_up != layout.gate_up_shape(*layout.sizes(torch.Size(down))):
        raise UnsupportedModelError(
            f"{where} has gate_up_proj {list(gate_up)} and down_proj {list(down)}, expected "
            f"{'[E, H, 2I] and [E, I, H]' if layout.transposed else '[E, 2I, H] and [E, H, I]'} "
            f"as is_transposed is {layout.transposed}"
        )


def _check_family(where: str, family: families.Family, found: families.StackLayout) -> None:
    differing = [
        f"{name} is {value}, expected {getattr(family.layout, name)}"
        for name, value in vars(found).items()
        if value != getattr(family.layout, name)
    ]
    if differing:
        raise UnsupportedModelError(
            f"{where} differs from what moeft knows of {family.name}: {'; '.join(differing)}; "
            "this release of transformers stores the experts in another way, use another or a newer moeft"
        )


def _activation(where: str, module: Any, layout: ExpertLayout) -> Activation:
    """The activation that gives what the module's own ``_apply_gate`` gives."""
    candidates: list[Activation] = []
    if callable(getattr(module, "act_fn", None)):
        candidates.append(module.act_fn)
    if all(isinstance(getattr(module, name, None), int | float) for name in ("alpha", "limit")):
        candidates.append(ClampedSwiglu(float(module.alpha), float(module.limit)))
    generator = torch.Generator().manual_seed(0)
    probe = (torch.rand(PROBE_ROWS, PROBE_COLUMNS, generator=generator, device="cpu") * 2 - 1) * PROBE_RANGE
    with torch.no_grad():
        expected = module._apply_gate(probe)
        for candidate in candidates:
            try:
                found = activate(candidate, *layout.split(probe))
            except TypeError:  # a function of gate and up, of no known form
                continue
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return candidate
    raise UnsupportedModelError(
        f"{where} combines gate and up in a way that moeft does not know: its _apply_gate gives neither "
        "act_fn(gate) * up nor a clamped SwiGLU; this activation of experts is not supported"
    )
