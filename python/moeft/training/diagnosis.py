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
        places: Rows of the micro-batch that are bad, from 0.
        rows: The same rows in the training set, from 0, as far as it holds them.
    """

    module: str | None
    detail: str
    places: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f"{self.detail} in {self.module}" if self.module else self.detail
        if self.rows:
            return f"{where}, rows {', '.join(map(str, self.rows))} of the training set"
        return f"{where}, rows {', '.join(map(str, self.places))} of the batch" if self.places else where


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
                return Diagnosis(module, detail, tuple(places), _rows_in(dataset, batch, places))
    return Diagnosis(None, "did not happen again in a second run of the same rows")


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
            {key: value[place : place + 1] if _is_by_row(value, size) else value for key, value in batch.items()},
        )


def _is_by_row(value: Any, rows: int) -> bool:
    return (isinstance(value, Tensor) and value.shape[:1] == (rows,)) or (
        isinstance(value, list) and len(value) == rows
    )


def _rows_in(dataset: Any, batch: Batch, places: Sequence[int]) -> tuple[int, ...]:
    """Numbers of rows of a batch in a dataset: those that the batch names, or else found by their ids."""
    if isinstance(named := batch.get("rows"), Tensor):
        return tuple(int(named[place]) for place in places)
    mask = batch.get("attention_mask")
    plain = isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape
    wanted = {place: batch["input_ids"][place] for place in places}
    ids = {
        place: (row[mask[place] != 0] if plain and mask is not None else row).tolist() for place, row in wanted.items()
    }
    found: dict[int, tuple[int, int]] = {}
    try:
        for number in range(len(dataset)):
            row = [int(token) for token in dataset[number]["input_ids"]]
            for place, of_batch in ids.items():
                if len(row) > found.get(place, (0, 0))[0] and _is_padded(row, of_batch):
                    found[place] = len(row), number
    except (TypeError, KeyError):  # a stream, or rows of another kind
        return ()
    return tuple(found[place][1] for place in places if place in found)


def _is_padded(row: list[int], ids: list[int]) -> bool:
    """Whether ids are a row and nothing behind it but one id, over and over: padding, where there is no mask."""
    return ids[: len(row)] == row and len(set(ids[len(row) :])) < 2


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
