"""Weights of the model that a recipe trains in full, and how their routing moved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config import SftRecipe
from moeft.config.optimizer import default_optimizer
from moeft.runs.context import RunContext
from moeft.runs.launch import launched_in_bf16_by_deepspeed

if TYPE_CHECKING:
    from moeft.training.trainer import MoeTrainer

ROUTER_ROWS = 16
ROUTING_BEFORE = "routing_before.safetensors"


def trainer_defaults(recipe: SftRecipe, sharded: bool) -> dict[str, Any]:
    """Trainer arguments that a recipe leaves open.

    FSDP and DeepSpeed keep float32 masters themselves, and shard them.
    """
    defaults: dict[str, Any] = {}
    optimizer = None if sharded else default_optimizer(bool(recipe.trained_roles()), recipe.dtype)
    if optimizer is not None and "optim" not in recipe.training:
        defaults["optim"] = optimizer
    if launched_in_bf16_by_deepspeed() and "bf16" not in recipe.training:
        defaults["bf16"] = True
    return defaults


class RouterWatch:
    """Compares the choices of the routers on training rows before and after; a restart keeps those before.

    Args:
        run: The run; its figures gain ``router_drift``, and its events one of that kind.
    """

    def __init__(self, run: RunContext[Any]) -> None:
        self._run = run
        asked = run.recipe.evaluation.router_drift_rows
        self.rows = (ROUTER_ROWS if run.recipe.trained_roles() else 0) if asked is None else asked

    def has_choices(self, trainer: MoeTrainer) -> bool:
        """Whether the choices before training are kept, or none are wanted."""
        return not self._watches(trainer) or self._path.exists()

    def before(self, trainer: MoeTrainer) -> None:
        """Keep the choices in the run folder."""
        from safetensors.torch import save_file

        if self.has_choices(trainer):
            return
        choices = {str(layer): chosen for layer, chosen in self._choices(trainer).items()}
        if trainer.is_world_process_zero():
            unfinished = self._path.with_suffix(".partial")
            save_file(choices, unfinished)
            unfinished.rename(self._path)

    def after(self, trainer: MoeTrainer) -> None:
        """Compare, and keep the figures."""
        from safetensors.torch import load_file

        from moeft.integration.router_drift import router_drift

        if not self._watches(trainer):
            return
        after = self._choices(trainer)
        if not trainer.is_world_process_zero():
            return
        before = {int(layer): chosen for layer, chosen in load_file(self._path).items()}
        drift = router_drift(before, after, _num_experts(trainer)).to_json()
        self._run.metrics["router_drift"] = drift
        self._run.folder.event("router_drift", **{key: value for key, value in drift.items() if key != "layers"})
        self._run.show(
            f"routing of {drift['tokens']} tokens after training: {drift['agreement']:.1%} of the experts the same, "
            f"load shifted by {drift['load_shift']:.1%}"
        )

    @property
    def _path(self) -> Path:
        return self._run.folder.path / ROUTING_BEFORE

    def _watches(self, trainer: MoeTrainer) -> bool:
        return self.rows > 0 and _num_experts(trainer) > 0

    def _choices(self, trainer: MoeTrainer) -> Mapping[int, Any]:
        from moeft.integration.router_drift import routing_choices

        return routing_choices(trainer.model, trainer.sample_sequences(self.rows))


def _num_experts(trainer: MoeTrainer) -> int:
    from moeft.training.routing_monitor import experts_modules

    modules: list[Any] = [module for _, module in experts_modules(trainer.model)]
    return max((int(module.num_experts) for module in modules), default=0)


def save_trained(run: RunContext[Any], trainer: MoeTrainer) -> None:
    """Write ``adapter/`` and ``trained/`` of the run folder, whatever of the two was trained."""
    if run.recipe.lora is not None:
        trainer.save_adapter(run.folder.path / "adapter", run.recipe.trained_adapters())
    if trainer.trains_base:
        trainer.save_trained_weights(run.folder.path / "trained")


def check_places(trainer: MoeTrainer, checkpoint: Path) -> None:
    """Refuse a checkpoint that has no place for a weight that trains, by name and shape.

    Raises:
        CheckpointError: Naming the weight.
    """
    from moeft.checkpoint import check_tensors
    from moeft.training.trained_weights import of_base

    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    check_tensors(checkpoint, _on_disk(trainer, of_base(trained), checkpoint))


def put_in_place(trainer: MoeTrainer, folder: Path, checkpoint: Path) -> None:
    """Overwrite the tensors of a merged checkpoint by the trained weights of a folder."""
    from safetensors.torch import load_file

    from moeft.checkpoint import overwrite_tensors
    from moeft.merging.manifest import update_checksums
    from moeft.training.trained_weights import FILE

    update_checksums(checkpoint, overwrite_tensors(checkpoint, _on_disk(trainer, load_file(folder / FILE), checkpoint)))


def _on_disk(trainer: MoeTrainer, weights: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    from moeft import _core
    from moeft.integration.disk_names import as_on_disk

    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {tensor["name"] for tensor in json.loads(_core.tensors(str(checkpoint)))}
    return as_on_disk(base, weights, names)
