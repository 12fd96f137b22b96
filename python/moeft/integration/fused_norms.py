"""Let the root-mean-square norms of a model, which transformers spells out, run in one pass.

A norm of transformers is six operations forward and about fifteen backward, each over all rows, and keeps a float32
copy of them for backward.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeft.kernels.dispatch import in_core, in_triton
from moeft.kernels.rms_norm import reference, rms_norm

EPS = ("eps", "variance_epsilon")  # transformers has both spellings
PROBE_ROWS = 8
PROBE_WIDTH = 64  # of a norm without a weight
# A few roundings of values near one, far below the difference that another formula makes.
PROBE_TOLERANCE = 1e-5
# Of 16-bit values: what another float32 rounding below may flip. Rounding once more changes a quarter of them.
PROBE_EQUAL_SHARE = 0.99


class Formula(NamedTuple):
    """What norms differ in, as :func:`moeft.kernels.rms_norm.rms_norm` takes it."""

    offset: float
    rounds_before_weight: bool | None  # None if neither order gives the norm's own 16-bit values


class FusedNorm:
    """Mixed into the class of a norm: what the kernel takes goes through it, all else the norm's own forward.

    Those are float32 rows on the CPU with a frozen weight, and rows on a GPU.
    """

    moeft_formula: Formula

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise ``[..., H]``."""
        weight, (offset, rounds_before_weight) = getattr(self, "weight", None), self.moeft_formula
        is_exact = hidden_states.dtype == torch.float32
        fits = not (args or kwargs) and (weight is None or weight.dtype == hidden_states.dtype)
        if fits and in_core(hidden_states):
            fits = is_exact and (weight is None or not weight.requires_grad)
        elif fits:
            fits = in_triton(hidden_states) and (is_exact or rounds_before_weight is not None)
        if not fits or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return rms_norm(
            hidden_states, weight, _eps(self), offset=offset, rounds_before_weight=bool(rounds_before_weight)
        )


def fuse_norms(model: nn.Module) -> int:
    """Give the root-mean-square norms of this model instance a forward of one pass.

    A norm is one whose class is named so and whose own output on random rows is that of the formula, in float32 and
    rounded to bfloat16. Its class becomes a subclass of the one it had, so that copies and casts of the model work as
    before. Outputs and gradients differ from transformers' by the order in which squares are summed in float32. Fusing
    again changes nothing.

    Args:
        model: A model of transformers, with or without a PEFT wrapper.

    Returns:
        How many norms are fused.
    """
    fused, classes, formulas = 0, dict[Any, Any](), dict[Any, Formula | None]()
    for module in model.modules():
        if not isinstance(module, FusedNorm) and type(module).__name__.endswith("RMSNorm"):
            weight = getattr(module, "weight", None)
            kind = type(module)
            key = kind, _eps(module), None if weight is None else weight.shape
            if key not in formulas:
                formulas[key] = _formula(module)
            formula = formulas[key]
            if formula is None:
                continue
            module.moeft_formula = formula  # type: ignore[assignment]
            module.__class__ = classes.setdefault(kind, _fused_class(kind))
        fused += isinstance(module, FusedNorm)
    return fused


def _fused_class(norm: type[nn.Module]) -> type[nn.Module]:
    """The subclass keeps the name, by which transformers and others recognise norms."""
    return type(norm.__name__, (FusedNorm, norm), {"__module__": norm.__module__, "__doc__": norm.__doc__})


def _eps(norm: nn.Module) -> Any:
    return next((getattr(norm, name) for name in EPS if hasattr(norm, name)), None)


@torch.no_grad()
def _formula(norm: nn.Module) -> Formula | None:
    """The formula of a norm; None if it is no norm of this kind.

    What computes is a copy on the CPU with a weight drawn for it, wherever the norm itself is.
    """
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    others = {*dict(norm.named_parameters()), *dict(norm.named_buffers())} - {"weight"}
    if not isinstance(eps, float) or others or (weight is not None and weight.ndim != 1):
        return None
    width = PROBE_WIDTH if weight is None else len(weight) or PROBE_WIDTH  # sharded ones are empty here
    # Said in full, since a program may have other defaults.
    drawing: Any = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu", "dtype": torch.float32}
    rows = torch.randn(PROBE_ROWS, width, **drawing)
    drawn = None if weight is None else torch.randn(width, **drawing)
    theirs = _own_output(norm, rows, drawn)
    for offset in (0.0, 1.0) if weight is not None else (0.0,):
        ours = reference.rms_norm(rows, drawn, eps, offset)
        if isinstance(theirs, Tensor) and torch.allclose(ours, theirs, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            return Formula(offset, _rounds_before_weight(norm, rows.bfloat16(), drawn, eps, offset))
    return None


def _rounds_before_weight(
    norm: nn.Module, rows: Tensor, weight: Tensor | None, eps: float, offset: float
) -> bool | None:
    weight = None if weight is None else weight.bfloat16()
    theirs = _own_output(norm, rows, weight)
    for answer in (False, True):
        ours = reference.rms_norm(rows, weight, eps, offset, answer)
        if ours.dtype == theirs.dtype and (ours == theirs).float().mean() >= PROBE_EQUAL_SHARE:
            return answer
    return None


def _own_output(norm: nn.Module, rows: Tensor, weight: Tensor | None) -> Any:
    """What the norm's own forward makes of rows, with another weight and without hooks."""
    probe = copy.copy(norm)
    # The copy shares the dictionary of the norm, which is to keep its weight.
    probe.__dict__["_parameters"] = {} if weight is None else {"weight": nn.Parameter(weight, requires_grad=False)}
    return probe.forward(rows)
