"""Merge methods in float64, written once more from their formulas to check the engine, with a bound of its rounding.

Each function returns the result and the *magnitude* of what was added up for it: the engine works in float32, so every
one of a few roundings moves a value by at most 2^-24 of that magnitude.

Source: the formulas of ``docs/merging.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLLINEAR = 0.9995
"""Slerp goes straight above this cosine."""


@dataclass
class Terms:
    """What a formula is made of, for one tensor. Weights are float64; deltas are those of the models to the base."""

    base: Tensor
    models: list[Tensor]
    deltas: list[Tensor]
    delta_magnitudes: list[Tensor]
    """Sums of the magnitudes that a delta was computed from."""
    weights: list[float]
    total_weight: float
    scale: float
    normalize: bool
    t: float = 0.0
    units: int = 1
    """Parts of the tensor with an angle or a ratio of their own, one after the other."""
    damping: Tensor | float = 1.0


Result = tuple[Tensor, Tensor]


def delta_sum(terms: Terms) -> Result:
    """``W + scale * damping * sum w_i d_i``, divided by the sum of the weights if they are normalised."""
    factor = terms.scale * terms.damping / (terms.total_weight if terms.normalize else 1.0)
    result, magnitude = terms.base.clone(), terms.base.abs()
    for weight, delta, size in zip(terms.weights, terms.deltas, terms.delta_magnitudes, strict=True):
        result += weight * factor * delta
        magnitude += (weight * torch.as_tensor(factor, dtype=torch.float64)).abs() * size
    return result, magnitude


def linear(terms: Terms) -> Result:
    """``sum w_i W_i / sum w_i``."""
    by = terms.total_weight if terms.normalize else 1.0
    result, magnitude = torch.zeros_like(terms.base), torch.zeros_like(terms.base)
    for weight, model in zip(terms.weights, terms.models, strict=True):
        result += weight / by * model
        magnitude += abs(weight / by) * model.abs()
    return result, magnitude


def slerp(terms: Terms) -> Result:
    """Along the arc from the base to the model; straight where it is nearly flat."""
    a = terms.base.reshape(terms.units, -1)
    b = terms.models[0].reshape(terms.units, -1)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = ((a * b).sum(1) / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
    angle = cosine.acos()
    straight = cosine.abs() > COLLINEAR
    sine = torch.where(straight, 1.0, angle.sin())
    left = torch.where(straight, 1 - terms.t, ((1 - terms.t) * angle).sin() / sine)[:, None]
    right = torch.where(straight, terms.t, (terms.t * angle).sin() / sine)[:, None]
    result, magnitude = left * a + right * b, (left * a).abs() + (right * b).abs()
    return result.reshape(terms.base.shape), magnitude.reshape(terms.base.shape)


CANCELLED = 1e-6
"""What is left of deltas that cancel out but for rounding."""


def model_stock(terms: Terms) -> Result:
    """``W + r * mean d_i`` with ``r = N cos / (1 + (N - 1) cos)`` and the mean cosine of all pairs of deltas.

    ``r`` is 0 for deltas that cancel out.
    """
    deltas = [delta.reshape(terms.units, -1) for delta in terms.deltas]
    count = len(deltas)
    cosines = [_cosine(deltas[i], deltas[j]) for i in range(count) for j in range(i + 1, count)]
    mean = torch.stack(cosines).mean(0)
    left = 1 + (count - 1) * mean
    ratio = torch.where(left > CANCELLED, count * mean / left.clamp(min=CANCELLED), 0.0)[:, None]
    moved = (ratio * torch.stack(deltas).mean(0)).reshape(terms.base.shape)
    sizes = torch.stack(terms.delta_magnitudes).mean(0).reshape(terms.units, -1)
    return terms.base + moved, terms.base.abs() + (ratio.abs() * sizes).reshape(terms.base.shape)


def passthrough(terms: Terms) -> Result:
    """``scale * W_0``."""
    return terms.scale * terms.models[0], (terms.scale * terms.models[0]).abs()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / torch.where(lengths > 0, lengths, 1.0), 0.0).clamp(-1, 1)


FORMULAS: dict[str, Callable[[Terms], Result]] = {
    "lora": delta_sum,
    "task_arithmetic": delta_sum,
    "fisher_damped": delta_sum,
    "linear": linear,
    "slerp": slerp,
    "model_stock": model_stock,
    "passthrough": passthrough,
}
"""Methods that can be checked value by value. Others drop weights by rank or at random, where one rounding decides."""


def half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of a floating type at these values."""
    info = torch.finfo(dtype)
    exponent = values.abs().clamp(min=info.smallest_normal).log2().floor()
    return torch.exp2(exponent) * info.eps / 2


def bound(result: Tensor, magnitude: Tensor, dtype: torch.dtype, roundings: int) -> Tensor:
    """How far a right float32 computation, rounded to ``dtype``, may be from ``result``.

    Half a step of the type, and half a step of float32 for every rounding on the way; a value that this carries over a
    power of two meets the wider step above.
    """
    noise = roundings * torch.finfo(torch.float32).eps / 2 * magnitude
    return half_step(result.abs() + noise, dtype) + noise


def count_roundings(models: int, ranks: Sequence[int]) -> int:
    """Roundings of the longest way to a value: sums over the rank, three for every model, and a few at the end."""
    return max(ranks, default=0) + 3 * models + 4
