"""``training.learning_rate: auto`` of a recipe: the largest rate at which a run should stay near its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.config import SftRecipe
from moeft.config.gate import GateDivergence
from moeft.config.learning_rate import default_rate, is_auto
from moeft.errors import TrainingError
from moeft.runs.context import RunContext
from moeft.runs.gate import base_divergence
from moeft.runs.gate_suite import DIVERGENCE_LIMIT
from moeft.runs.training_plan import planned_steps

if TYPE_CHECKING:
    from moeft.training.trainer import MoeTrainer

FILE = "learning_rate.json"


def default_rate_of(recipe: SftRecipe) -> float:
    """Rate of a recipe that gives none."""
    return default_rate(recipe.trained_roles(), () if recipe.lora is None else recipe.lora.targets)


def settle_rate(run: RunContext[Any], trainer: MoeTrainer) -> None:
    """Give the trainer the rate of a range test, if its recipe asks for one; an earlier start's is taken as it is.

    Args:
        run: The run; its folder gains ``learning_rate.json``, and its figures ``learning_rate``.
        trainer: Whose model is still the base.

    Raises:
        DataError: If the rows of the divergence cannot be used.
        TrainingError: If already the lowest rate moves the model too far.
    """
    if not is_auto(run.recipe.training):
        return
    found = run.folder.read_json(FILE)
    if found is None:
        with run.stage("learning rate"):
            found = _test(run, trainer)
            run.folder.write_json(FILE, found)
    run.metrics["learning_rate"] = found
    trainer.args.learning_rate = found["rate"]


def _test(run: RunContext[Any], trainer: MoeTrainer) -> dict[str, Any]:
    from moeft.training.range_test import range_test

    recipe: SftRecipe = run.recipe
    settings = recipe.range_test
    watched = None if recipe.gate is None else recipe.gate.divergence
    limit = settings.limit or (DIVERGENCE_LIMIT if watched is None else watched.limit)
    seed = settings.seed if recipe.gate is None else recipe.gate.seed
    base = base_divergence(watched or GateDivergence(limit=limit), trainer, seed)
    steps = planned_steps(trainer)
    bound = limit * min(1.0, settings.steps / steps)

    def divergence() -> float:
        nats, tokens = base.measure().sum(axis=0)
        return float(nats / tokens)

    points = range_test(
        trainer,
        divergence,
        settings.rates(default_rate_of(recipe)),
        steps=settings.steps,
        bound=bound,
        seed=settings.seed,
    )
    run.show(
        f"learning rate: KL(base || model) after {settings.steps} steps, bound {bound:.3g} "
        f"({limit:g} for all {steps} steps)"
    )
    for point in points:
        verdict = "" if point.is_within else "  beyond the bound"
        run.show(f"  {point.rate:.2e}  KL {point.divergence:.3g}  loss {point.loss:.4f}{verdict}")
    within = [point for point in points if point.is_within]
    if not within:
        raise TrainingError(
            f"learning_rate: auto: already {points[0].rate:.2g} moves the model by {points[0].divergence:.3g} nats per "
            f"token in {settings.steps} steps, and the bound is {bound:.3g}; lower range_test.lowest, train fewer "
            "steps, or raise the limit"
        )
    chosen = within[-1].rate
    at_the_end = "" if len(within) < len(points) else "; no rate of the range broke the bound"
    run.show(f"learning rate: {chosen:.2e}{at_the_end}")
    return {
        "rate": chosen,
        "limit": limit,
        "bound": bound,
        "steps": settings.steps,
        "planned_steps": steps,
        "points": [point.to_json() for point in points],
    }
