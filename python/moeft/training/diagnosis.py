"""Where a bad step went wrong: the first module with a value that is not finite, and the rows of the batch.

Runs after a bad step only, on the micro-batches of that step; a good step pays for nothing but keeping its token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
ROOTS = ("", "base_model", "base_model.model")  # a whole model, whose output is its loss, plain or in PEFT's wrappers
ComputeLoss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Diagnosis:
    """What a second look at a bad step found.

    Attributes:
        module: First module whose output is not finite, or parameter whose gradient is not; None if it did not happen
            again.
        detail: What is wrong there.
        rows: Rows of the training set; their places in the batch, as ``-1 - place``, where the set does not hold them.
    """

    module: str | None
    detail: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        known = ", ".join(str(row) for row in self.rows if row >= 0)
        places = ", ".join(str(-1 - row) for row in self.rows if row < 0)
        found = [f"rows {known} of the training set" if known else "", f"rows {places} of the batch" if places else ""]
        where = f"{self.detail} in {self.module}" if self.module else self.detail
        return ", ".join([where, *filter(None, found)])


def diagnose(
    model: nn.Module, compute_loss: ComputeLoss, batches: Sequence[Batch], dataset: Any, *, backward: bool
) -> Diagnosis:
    """Run micro-batches again, without touching gradients or the random state.

    Args:
        model: The model, in training mode as it was.
        compute_loss: Loss of a batch.
        batches: Micro-batches that may be at fault.
        dataset: Training rows, a sequence of mappings with ``input_ids``; rows are found by their ids.
        backward: Whether the loss was fine and a gradient was not.
    """
    with _same_random_state():
        for batch in batches:
            module, detail = _first_bad_module(model, compute_loss, batch)
            if module is None and backward:
                module, detail = _first_bad_gradient(model, compute_loss(batch))
            places = [place for place, row in _rows_of(batch) if _is_bad(model, compute_loss, row, backward)]
            if module is not None or detail or places:
                # A fault of the whole batch that no row has alone concerns them all.
                places = places or [place for place, _ in _rows_of(batch)]
                return Diagnosis(module, detail, tuple(_row_number(batch, place, dataset) for place in places))
    return Diagnosis(None, "did not happen again in a second run of the same rows", ())


def _first_bad_module(model: nn.Module, compute_loss: ComputeLoss, batch: Batch) -> tuple[str | None, str]:
    found: list[tuple[str, nn.Module]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append((name, module))

        return hook

    # Hooks run when a module is done, so an inner module comes before the one around it.
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            compute_loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None, ""
    name, module = found[0]
    if _name_in_base(name) in ROOTS:
        return None, "the loss itself is not finite, though the outputs of all layers are"
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    spoiled = [part for part, tensor in own if not _finite(tensor)]
    detail = f"its {', '.join(spoiled)} is not finite" if spoiled else "first output that is not finite"
    return _name_in_base(name), detail


def _first_bad_gradient(model: nn.Module, loss: Tensor) -> tuple[str | None, str]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    bad = [name for (name, _), gradient in zip(named, gradients, strict=True) if not _finite(gradient)]
    # Gradients flow from the last layer to the first, and so does what spoils them.
    return (_name_in_base(bad[-1]), "first gradient that is not finite") if bad else (None, "")


def _is_bad(model: nn.Module, compute_loss: ComputeLoss, row: Batch, backward: bool) -> bool:
    if not backward:
        with torch.no_grad():
            return not _finite(compute_loss(row))
    return _first_bad_gradient(model, compute_loss(row))[0] is not None


def _rows_of(batch: Batch) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row as a batch of its own."""
    size = len(batch["input_ids"])
    for place in range(size):
        yield (
            place,
            {
                key: value[place : place + 1] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
                for key, value in batch.items()
            },
        )


def _row_number(batch: Batch, place: int, dataset: Any) -> int:
    """Where the training set holds a row of a batch; ``-1 - place`` if it does not, or cannot be searched."""
    mask = batch.get("attention_mask")
    ids = batch["input_ids"][place]
    ids = (
        ids[mask[place] != 0] if isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape else ids
    ).tolist()
    try:
        rows = [(number, list(dataset[number]["input_ids"])) for number in range(len(dataset))]
    except (TypeError, KeyError):
        return -1 - place
    # Without a mask what follows a row is padding: one id, over and over.
    fitting = [(len(row), -number) for number, row in rows if ids[: len(row)] == row and len(set(ids[len(row) :])) < 2]
    return -max(fitting)[1] if fitting else -1 - place


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    return all(_finite(item) for item in value) if isinstance(value, list | tuple) else True


def _name_in_base(path: str) -> str:
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


@contextmanager
def _same_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
