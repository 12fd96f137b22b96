"""The trainer's callback that damps gradients inside a subspace and takes updates out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moeft.config.optimizer import keeps_masters, steps_in_backward
from moeft.config.protection import Protection
from moeft.errors import CheckpointError
from moeft.integration.lora import base_fingerprint
from moeft.training.optim import HostAdamW, nothing_if_void
from moeft.training.protection.files import SubspaceFile, normalised_layer_importance
from moeft.training.protection.parameters import TrainedParameter, trained_parameters
from moeft.training.protection.projector import Projector, whole_float32

if TYPE_CHECKING:
    from moeft.training.progress import EventSink

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class _Protected:
    trained: TrainedParameter
    projector: Projector
    share: float


class SubspaceProtection(TrainerCallback):
    """Keeps a share of every gradient, and of every update, out of the subspace of its weight.

    Gradients are damped after clipping, so that the norm that is logged and clipped is that of the data. Adam divides
    every element by a scale of its own, which turns an update back into the subspace, and weight decay never asked; so
    with ``project`` the change that the step made is projected too. Of a weight only its coordinates in the subspace
    are remembered over the step. There is no state: a run that resumes continues bit for bit.

    Args:
        model: The model to train, after its adapters were added.
        settings: The recipe's section.
        events: Where to record what is protected.

    Raises:
        CheckpointError: If a file cannot be read, belongs to another base, lacks a weight that is trained or its layer,
            or holds it in another shape.
        ValueError: If the rank is higher than the file's, or so high that nothing is left to train.
    """

    def __init__(self, model: nn.Module, settings: Protection, events: EventSink | None = None) -> None:
        self.settings = settings
        self.events = events
        file = SubspaceFile(settings.subspace)
        if not settings.derived:
            _check_base(model, file)
        rank = file.rank if settings.rank is None else settings.rank
        if rank > file.rank:
            raise ValueError(f"rank is {rank}, but {file.path} holds {file.rank} directions; make it anew for more")
        self._file, self._rank = file, rank
        self._shares = [
            (trained, share) for trained, share in _shares(trained_parameters(model, file), settings) if share > 0
        ]
        for trained, share in self._shares:
            _check_room(trained, rank, share)
        self._protected: list[_Protected] = []
        self._held: list[tuple[_Protected, Tensor]] = []

    def check_optimizer(self, args: Any, given: Any = None) -> None:
        """Refuse an optimiser whose updates cannot be held.

        Args:
            args: Settings of the trainer, which name the optimiser.
            given: One that is used in its place.

        Raises:
            ValueError: If it steps in backward, or updates of 16-bit weights without masters are to be projected.
        """
        name = args.optim if given is None else type(given).__name__
        if self._shares and steps_in_backward(name):
            raise ValueError(
                f"optim {name!r} changes weights in backward, before protection sees a gradient; take adamw_torch"
            )
        if isinstance(given, HostAdamW):
            has_masters = all(group["master_weights"] for group in given.param_groups)
        else:
            has_masters = given is None and keeps_masters(name, args.optim_args)
        rounded = [trained for trained, _ in self._shares if trained.parameter.element_size() < FLOAT32_BYTES]
        if self.settings.mode == "project" and rounded and not has_masters:
            raise ValueError(
                f"protection.mode is project, but {rounded[0].name} is {rounded[0].parameter.dtype} and optim {name!r} "
                "keeps no float32 master of it, so rounding leads it back into the subspace; set optim to "
                "adamw_moeft_host or adamw_moeft_8bit, train in float32, or set protection.mode to scale_mask"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the bases to the devices of their parameters."""
        self._bring()
        if self.events is not None:
            self.events.event(
                "protection",
                mode=self.settings.mode,
                parameters=len(self._protected),
                bytes=sum(protected.projector.nbytes for protected in self._protected),
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the bases."""
        self._protected = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Damp the gradients; remember where the weights are in their subspaces."""
        self.before_step(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take out of the update what moved inside the subspaces."""
        self.after_step(kwargs["optimizer"])

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Hold the bases for steps that are taken outside of training."""
        self._bring()
        try:
            yield
        finally:
            self._protected, self._held = [], []

    @torch.no_grad()
    @whole_float32()
    def before_step(self, optimizer: Any) -> None:
        """Damp the gradients; remember where the weights are in their subspaces."""
        self._held = []
        for protected in self._protected:
            parameter, view = protected.trained.parameter, protected.trained.view
            if parameter.grad is None:
                continue
            gradient = view(parameter.grad)
            protected.projector.subtract_(gradient, protected.projector.coordinates(gradient), protected.share)
            if self.settings.mode == "project":
                weight = _weight(parameter, optimizer)
                self._held.append((protected, protected.projector.coordinates(view(weight))))

    @torch.no_grad()
    @whole_float32()
    def after_step(self, optimizer: Any) -> None:
        """Take out of the update what moved inside the subspaces."""
        for protected, before in self._held:
            parameter, view = protected.trained.parameter, protected.trained.view
            weight = _weight(parameter, optimizer)
            moved = nothing_if_void(protected.projector.coordinates(view(weight)) - before, optimizer)
            protected.projector.subtract_(view(weight), moved, protected.share)
            if weight is not parameter:
                _master(parameter, optimizer).copy_(weight)
                parameter.copy_(weight)
        self._held = []

    def _bring(self) -> None:
        self._protected = [_Protected(t, self._projector(t), share) for t, share in self._shares]

    def _projector(self, trained: TrainedParameter) -> Projector:
        left, right = (
            self._file.basis(trained.weight, side, self._rank).to(trained.parameter.device)
            if side in trained.sides
            else None
            for side in ("U", "V")
        )
        return Projector(left, right)


def _weight(parameter: Tensor, optimizer: Any) -> Tensor:
    """What the optimiser's step changes: the parameter, or on its device the master copy that it is rounded from."""
    master = _master(parameter, optimizer)
    return parameter if master is None else master.to(parameter.device)


def _master(parameter: Tensor, optimizer: Any) -> Any:
    return optimizer.state.get(parameter, {}).get("master")


def _shares(found: list[TrainedParameter], settings: Protection) -> list[tuple[TrainedParameter, float]]:
    if settings.layer_importance is None:
        return [(trained, settings.strength) for trained in found]
    importance = normalised_layer_importance(settings.layer_importance)
    if missing := sorted({trained.layer for trained in found} - importance.keys()):
        raise CheckpointError(
            f"{settings.layer_importance} lacks layer {missing[0]}, which is trained; measure all layers that are"
        )
    return [(trained, settings.strength * importance[trained.layer]) for trained in found]


def _check_base(model: Any, file: SubspaceFile) -> None:
    actual = base_fingerprint(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if actual and actual != file.base_fingerprint:
        raise CheckpointError(
            f"{file.path} is of an instruct model with fingerprint {file.base_fingerprint}, but the model to train has "
            f"{actual}; make the file from this model and the one it was tuned from, or set protection.derived if this "
            "model was made from that one"
        )


def _check_room(trained: TrainedParameter, rank: int, share: float) -> None:
    rows, columns = trained.view(trained.parameter).shape[-2:]
    sizes = {"U": (rows,), "V": (columns,), "UV": (rows, columns)}[trained.sides]
    if share == 1 and all(rank >= size for size in sizes):
        raise ValueError(
            f"rank is {rank}, all there is of {trained.name} {list(trained.parameter.shape)}: nothing would be left to "
            "train; set a lower protection.rank, or a strength below 1"
        )
