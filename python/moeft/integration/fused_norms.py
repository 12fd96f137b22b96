"""Let the root-mean-square norms of a model, which transformers spells out, run in one pass.

A norm of transformers is six operations forward and about fifteen backward, each over all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeft.kernels.dispatch import in_core
from moeft.kernels.rms_norm import reference, rms_norm

EPS = ("eps", "variance_epsilon")  # transformers has both spellings
PROBE_ROWS = 2
# A few roundings of values near one, far below the difference that another formula makes.
PROBE_TOLERANCE = 1e-5


class FusedNorm:
    """Mixed into the class of a norm: float32 rows on the CPU take the kernel, all else the norm's own forward."""

    moeft_offset: float  # added to the weight: Gemma 2 and 3 store it less one

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise ``[..., H]``."""
        weight = getattr(self, "weight", None)
        fits = hidden_states.dtype == torch.float32 and in_core(hidden_states) and not (args or kwargs)
        if weight is not None:
            fits = fits and weight.dtype == torch.float32 and not weight.requires_grad
        if not fits or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if weight is not None and self.moeft_offset:
            weight = weight + self.moeft_offset
        return rms_norm(hidden_states, weight, _eps(self))


def fuse_norms(model: nn.Module) -> int:
    """Give the root-mean-square norms of this model instance a forward of one pass.

    A norm is one whose class is named so and whose own output on random rows is that of the formula. Its class becomes
    a subclass of the one it had, so that copies and casts of the model work as before. Outputs and gradients differ
    from transformers' by float32 roundings. Fusing again changes nothing.

    Args:
        model: A model of transformers, with or without a PEFT wrapper.

    Returns:
        How many norms are fused.
    """
    fused, classes = 0, dict[Any, Any]()
    for module in model.modules():
        if not isinstance(module, FusedNorm) and type(module).__name__.endswith("RMSNorm"):
            offset = _offset(module)
            if offset is None:
                continue
            module.moeft_offset = offset  # type: ignore[assignment]
            kind = type(module)
            module.__class__ = classes.setdefault(kind, _fused_class(kind))
        fused += isinstance(module, FusedNorm)
    return fused


def _fused_class(norm: type[nn.Module]) -> type[nn.Module]:
    """The subclass keeps the name, by which transformers and others recognise norms."""
    return type(norm.__name__, (FusedNorm, norm), {"__module__": norm.__module__, "__doc__": norm.__doc__})


def _eps(norm: nn.Module) -> Any:
    return next((getattr(norm, name) for name in EPS if hasattr(norm, name)), None)


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    """What is added to the norm's weight; None if it is no norm of this kind, or not one that the kernel can take."""
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if not isinstance(eps, float) or (weight is not None and (weight.ndim != 1 or weight.dtype != torch.float32)):
        return None
    if weight is not None and weight.device.type != "cpu":
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_ROWS, 8 if weight is None else len(weight), generator=generator)
    theirs = norm.forward(probe)  # without hooks
    for offset in (0.0, 1.0) if weight is not None else (0.0,):
        ours = reference.rms_norm(probe, None if weight is None else weight + offset, eps)
        if isinstance(theirs, Tensor) and torch.allclose(ours, theirs, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            return offset
    return None
