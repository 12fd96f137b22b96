"""Which round of ``moeft hard iterate`` is the best, and whether another one follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moeft.config.iterate import IterateRecipe

Entries = Sequence[Mapping[str, Any]]
"""Of each round from 0 on: ``accuracy``, ``gate_loss``, and ``stopped``, why the gate of its training stopped it."""


def reason_to_stop(recipe: IterateRecipe, rounds: Entries) -> str | None:
    """Why no further round is to follow those that were measured, or None."""
    last = rounds[-1]
    if (stopped := last.get("stopped")) is not None:
        return f"the capability gate stopped round {len(rounds) - 1}: {stopped['reason']}"
    if recipe.gate is not None and not _loss_holds(recipe, rounds, last):
        rise = _loss(last) - _loss(rounds[0])
        return f"the loss of the gate rose by {rise:.3g}, more than {recipe.gate.max_rise:g}"
    if len(rounds) > 1:
        gain = last["accuracy"]["value"] - rounds[-2]["accuracy"]["value"]
        if gain <= recipe.min_gain:
            return f"held-out accuracy changed by {gain:+.1%}, no more than {recipe.min_gain:.1%}"
    if len(rounds) > recipe.rounds:
        return f"{recipe.rounds} rounds"
    return None


def best_round(recipe: IterateRecipe, rounds: Entries) -> int:
    """The most accurate round whose gates hold, round 0 among them; the earliest of equals."""
    kept = [number for number, entry in enumerate(rounds) if _holds(recipe, rounds, entry)]
    return max(kept, key=lambda number: (rounds[number]["accuracy"]["value"], -number))


def _holds(recipe: IterateRecipe, rounds: Entries, entry: Mapping[str, Any]) -> bool:
    stopped = entry.get("stopped")
    # Weights that were rolled back are those of a step at which the gate held.
    return (stopped is None or stopped["rolled_back_to"] is not None) and _loss_holds(recipe, rounds, entry)


def _loss_holds(recipe: IterateRecipe, rounds: Entries, entry: Mapping[str, Any]) -> bool:
    if recipe.gate is None or entry is rounds[0]:
        return True
    return _loss(entry) - _loss(rounds[0]) <= recipe.gate.max_rise


def _loss(entry: Mapping[str, Any]) -> float:
    # What is not a number is null in a file.
    return math.nan if entry["gate_loss"] is None else float(entry["gate_loss"])
