"""The diagonal of the Fisher information of a model's weights: the mean squared gradient of the log-likelihood."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeft.config.protection import FISHER_FORMAT, LAYER_IMPORTANCE_FORMAT
from moeft.config.ranges import Numbers
from moeft.errors import CheckpointError, DataError
from moeft.importance.disk import Disk, DiskWeight
from moeft.importance.gradients import SquaredGradients
from moeft.importance.groups import groups_within
from moeft.importance.likelihood import Labels, log_likelihood
from moeft.importance.tensor_file import Spec, TensorFile
from moeft.importance.weights import ModelWeight, chosen_weights
from moeft.integration import model_family
from moeft.integration.lora import base_fingerprint
from moeft.progress_bar import Callback
from moeft.provenance.files import write_json

FISHER_FILE = "fisher.safetensors"
LAYERS_FILE = "layer_importance.json"


@dataclass(frozen=True)
class FisherReport:
    """What :func:`fisher` found. ``str()`` is a table.

    Attributes:
        path: The folder.
        samples: Sequences.
        tokens: Tokens with a label.
        weights: Linear layers and stacks.
        layers: Decoder layer -> mean of the diagonal over its weights.
        seconds: Wall time of this start.
    """

    path: Path
    samples: int
    tokens: int
    weights: int
    layers: dict[int, float]
    seconds: float

    def __str__(self) -> str:
        largest = max(self.layers.values()) or 1.0
        lines = [f"{'layer':>5}{'mean Fisher':>14}{'of the largest':>16}"]
        lines += [f"{layer:>5}{mean:>14.4e}{mean / largest:>16.1%}" for layer, mean in self.layers.items()]
        return "\n".join([*lines, f"{self.weights} weights, {self.samples} sequences, {self.tokens:,} labels"])


def fisher(
    model: Any,
    rows: Sequence[dict[str, Any]],
    out: str | Path,
    *,
    base: str | Path,
    targets: Sequence[str] | None = None,
    layers: Numbers | None = None,
    labels: Labels = "data",
    memory_bytes: int = 4 << 30,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callback | None = None,
) -> FisherReport:
    """Measure how much the likelihood of some sequences depends on every weight.

    ``F = 1/n * sum over n sequences of (d log p(labels | sequence) / d w)^2``, where a sequence's log-likelihood is the
    sum over its labels. Gradients are squared one sequence at a time and added up in float32. With the labels of the
    data this is the empirical Fisher information; with labels drawn from the model, an estimate of the true one.

    All weights stay frozen, packed ones packed. Sequences are read once per group of weights, forward and back to the
    lowest layer of the group; groups are as large as ``memory_bytes`` allows. A finished weight survives a kill.

    Args:
        model: A causal language model of a known family, 16-bit, 32-bit or packed, without adapters.
        rows: ``input_ids`` and ``labels`` of each sequence, lists; -100 where a token does not count.
        out: Folder for ``fisher.safetensors`` (names and shapes as on the disk of the 16-bit base) and
            ``layer_importance.json``. The same call goes on after an interruption.
        base: Folder that the model was loaded from.
        targets: Any of "attention", "experts", "mlp"; all that the model has by default.
        layers: Decoder layers, as numbers and ranges such as ``[0, "4-7"]``; all by default.
        labels: "data"; "sampled" for tokens drawn from the model at the places of the data's labels; "generated" for
            rows whose labels are replies that the model drew, which the file's metadata then says.
        memory_bytes: Most memory of the float32 accumulators, besides that of model and activations.
        seed: Of the draw.
        dtype: Of the file, bfloat16 or float32; the mean is rounded once.
        progress: Called with steps done, steps in all and the weight at hand.

    Raises:
        ValueError: If an argument cannot be used, or one weight needs more than ``memory_bytes``.
        DataError: If there are no rows, or the likelihood of one is not finite.
        CheckpointError: If a weight is not in the base, or ``out`` holds a result.
        UnsupportedModelError: If the model's family, head or experts are unknown.

    Source:
        Kirkpatrick et al., https://arxiv.org/abs/1612.00796; empirical or true: https://arxiv.org/abs/1905.12558
    """
    started = time.perf_counter()
    if not rows:
        raise DataError("there are no sequences to measure; give at least one")
    disk = Disk(base)
    weights = chosen_weights(model, model_family.of_model(model), targets, layers)
    places = {weight.name: _place(disk, weight) for weight in weights}
    specs = {
        name: Spec(dtype, tuple(part.shape))
        for weight in weights
        for name, part in places[weight.name].split(torch.empty(weight.shape, device="meta"))
    }
    sizes = {weight.name: math.prod(weight.shape) for weight in weights}
    groups_within(sizes, memory_bytes)  # so that too little memory is refused before there is a file
    out = Path(out)
    with TensorFile(out / FISHER_FILE, specs, _metadata(model, rows, labels, seed)) as file:
        groups = groups_within({name: sizes[name] for name in sizes if name not in file.finished}, memory_bytes)
        by_name = {weight.name: weight for weight in weights}
        for number, group in enumerate(groups):
            step = _steps(progress, number * len(rows), len(groups) * len(rows), group[0])
            totals = _accumulate(model, [by_name[name] for name in group], rows, labels, seed, step)
            for name in group:
                _write(file, places[name], by_name[name], totals.pop(name).div_(len(rows)))
        means = _layer_means(file.finished.values())
        write_json(out / LAYERS_FILE, {"format": LAYER_IMPORTANCE_FORMAT, "layers": means})
        file.finish()
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    return FisherReport(out, len(rows), tokens, len(weights), means, time.perf_counter() - started)


def _place(disk: Disk, weight: ModelWeight) -> DiskWeight:
    name = disk.canonical(weight.parameter)
    if name not in disk.weights:
        raise CheckpointError(f"{disk.path} holds no {name}, which the model has; was the model loaded from there?")
    return disk.weights[name]


def _metadata(model: Any, rows: Sequence[dict[str, Any]], labels: str, seed: int) -> dict[str, str]:
    text = json.dumps([[row["input_ids"], row["labels"]] for row in rows])
    quantization = getattr(model.config, "quantization_config", None)
    found = {
        "format": FISHER_FORMAT,
        "base_fingerprint": base_fingerprint(model) or "",
        "samples": str(len(rows)),
        "labels": labels,
        "rows_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "precision": str(model.dtype).removeprefix("torch.") if quantization is None else "moeft_nf4",
    }
    return found | ({"seed": str(seed)} if labels == "sampled" else {})


def _accumulate(
    model: Any,
    group: Sequence[ModelWeight],
    rows: Sequence[dict[str, Any]],
    labels: Labels,
    seed: int,
    step: Callable[[int], None],
) -> dict[str, Tensor]:
    """Sum of squared gradients of each weight of a group, float32, on the weight's device."""
    totals = {weight.name: torch.zeros(weight.shape, device=weight.device) for weight in group}
    lowest = min(group, key=lambda weight: weight.layer)
    with SquaredGradients(model, totals, model.get_submodule(lowest.layer_path)) as gradients:
        for index, row in enumerate(rows):
            gradients.next_sequence()
            value = log_likelihood(model, row, labels, seed + index)
            if not math.isfinite(float(value.detach())):
                raise DataError(f"the log-likelihood of sequence {index} is {float(value.detach())}; look at that row")
            value.backward()
            step(index + 1)
    return totals


def _write(file: TensorFile, place: DiskWeight, weight: ModelWeight, mean: Tensor) -> None:
    total = sum(float(part.sum(dtype=torch.float64)) for part in (mean if mean.ndim == 3 else [mean]))
    if not math.isfinite(total):
        raise DataError(f"the gradient of {weight.name} is not finite for some sequence; look at the rows")
    for name, part in place.split(mean):
        file.write(name, part)
    file.commit(weight.name, place.tensors, layer=weight.layer, sum=total, elements=mean.numel())


def _layer_means(facts: Any) -> dict[int, float]:
    sums: dict[int, float] = defaultdict(float)
    elements: dict[int, int] = defaultdict(int)
    for of_weight in facts:
        sums[of_weight["layer"]] += of_weight["sum"]
        elements[of_weight["layer"]] += of_weight["elements"]
    return {layer: sums[layer] / elements[layer] for layer in sorted(sums)}


def _steps(progress: Callback | None, before: int, total: int, what: str) -> Callable[[int], None]:
    return (lambda done: None) if progress is None else (lambda done: progress(before + done, total, what))
