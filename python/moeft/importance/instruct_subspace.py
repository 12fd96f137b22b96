"""The subspace in which an instruct model differs from its base: the largest singular directions of every difference.

Shapes: E experts, F outputs, K inputs, r rank.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeft import _core
from moeft.config.protection import SUBSPACE_FORMAT
from moeft.config.ranges import Numbers, expand
from moeft.errors import CheckpointError
from moeft.importance.disk import Disk, DiskWeight
from moeft.importance.reader import MatrixReader
from moeft.importance.svd import Truncated, truncated_svd
from moeft.importance.tensor_file import Spec, TensorFile
from moeft.progress_bar import Callback

TARGETS = ("attention", "experts", "mlp")
PARTS = ("U", "S", "V", "residual")
Shape = tuple[int | None, int, int]  # experts of a stack, outputs, inputs


@dataclass(frozen=True)
class SubspaceReport:
    """What :func:`subspace` found. ``str()`` is a table.

    Attributes:
        path: The file.
        residuals: Weight -> relative residual of each of its matrices, ``|D - U S V^T| / |D|``.
        seconds: Wall time of this start.
    """

    path: Path
    residuals: dict[str, list[float]]
    seconds: float

    def __str__(self) -> str:
        by_kind: dict[str, list[float]] = {}
        for name, values in self.residuals.items():
            by_kind.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).extend(values)
        lines = [f"{'weight':<14}{'matrices':>9}{'mean residual':>15}{'largest':>9}"]
        for kind, values in by_kind.items():
            lines.append(f"{kind:<14}{len(values):>9}{sum(values) / len(values):>15.4f}{max(values):>9.4f}")
        return "\n".join(lines)


def subspace(
    it: str | Path,
    pt: str | Path,
    out: str | Path,
    *,
    rank: int = 256,
    targets: Sequence[str] | None = None,
    layers: Numbers | None = None,
    power_iterations: int = 2,
    seed: int = 0,
    device: str = "cpu",
    progress: Callback | None = None,
) -> SubspaceReport:
    """Decompose ``W_it - W_pt`` of every matrix of the decoder layers, each expert's on its own.

    One matrix is in memory at a time. A weight that is finished survives a kill; the same call goes on, and the file
    gets its name when it is complete.

    Args:
        it: Folder of the instruct model, 16- or 32-bit.
        pt: Folder of the model that it was tuned from. Fused or not does not matter.
        out: Safetensors file to make: per weight, by its name in the text model, ``<name>.U [F, r]``, ``<name>.S [r]``,
            ``<name>.V [K, r]`` and ``<name>.residual [1]``, float32; of a stack with E in front of each. The metadata
            names the fingerprints of both models.
        rank: Directions to keep, at most the shorter side of every matrix.
        targets: Any of "attention", "experts", "mlp"; all that the model has by default.
        layers: Decoder layers, as numbers and ranges; all by default.
        power_iterations: Of the randomised decomposition, see :func:`moeft.importance.svd.truncated_svd`.
        seed: Of its sketch.
        device: Where to compute.
        progress: Called with matrices done, matrices in all and the weight at hand.

    Raises:
        ValueError: If rank, targets, layers or power_iterations cannot be used.
        CheckpointError: If a checkpoint is damaged or packed, the two do not hold the same weights, a difference is not
            finite, or ``out`` exists.
        UnsupportedModelError: If no family file knows a ``model_type``.
    """
    started = time.perf_counter()
    if rank < 1 or power_iterations < 0:
        raise ValueError(f"rank is {rank} and power_iterations {power_iterations}, expected at least 1 and 0")
    tuned, base = MatrixReader(Disk(it)), MatrixReader(Disk(pt))
    weights = _chosen(tuned.disk, targets, layers)
    shapes = {weight.name: _common_shape(tuned, base, weight) for weight in weights}
    metadata = {
        "format": SUBSPACE_FORMAT,
        "base_fingerprint": _core.fingerprint(str(it)),
        "pt_fingerprint": _core.fingerprint(str(pt)),
        "rank": str(rank),
        "power_iterations": str(power_iterations),
        "seed": str(seed),
    }
    matrices = [(w, e) for w in weights for e in _experts(shapes[w.name])]
    with TensorFile(out, _specs(shapes, rank), metadata) as file:
        residuals: list[float] = []
        for done, (weight, expert) in enumerate(matrices, start=1):
            if weight.name in file.finished:
                continue
            difference = _difference(tuned, base, weight, expert).to(device)
            generator = _generator(f"{seed} {weight.name} {expert}")
            found = truncated_svd(difference, rank, generator, power_iterations)
            _write(file, weight.name, found, expert or 0)
            residuals.append(found.residual)
            if done == len(matrices) or matrices[done][0] != weight:
                file.commit(weight.name, [f"{weight.name}.{part}" for part in PARTS], residuals=residuals)
                residuals = []
            if progress is not None:
                progress(done, len(matrices), weight.name)
        file.finish()
    by_name = {weight.name: file.finished[weight.name]["residuals"] for weight in weights}
    return SubspaceReport(Path(out), by_name, time.perf_counter() - started)


def _experts(shape: Shape) -> Sequence[int | None]:
    return [None] if shape[0] is None else range(shape[0])


def _specs(shapes: dict[str, Shape], rank: int) -> dict[str, Spec]:
    specs = {}
    for name, (experts, outputs, inputs) in shapes.items():
        if rank > min(outputs, inputs):
            raise ValueError(
                f"rank is {rank}, but {name} is {outputs} x {inputs}; give at most {min(outputs, inputs)}, or leave "
                "its target out"
            )
        stack = () if experts is None else (experts,)
        for part, shape in zip(PARTS, ((outputs, rank), (rank,), (inputs, rank), (1,)), strict=True):
            specs[f"{name}.{part}"] = Spec(torch.float32, (*stack, *shape))
    return specs


def _chosen(disk: Disk, targets: Sequence[str] | None, layers: Numbers | None) -> list[DiskWeight]:
    weights = sorted(disk.weights.values(), key=lambda weight: (weight.layer, weight.name))
    present = [target for target in TARGETS if any(disk.component(weight.name) == target for weight in weights)]
    wanted = present if targets is None else list(targets)
    if absent := [target for target in wanted if target not in present]:
        raise ValueError(f"targets holds {absent[0]!r}, but {disk.path} has {', '.join(present) or 'none of them'}")
    in_layers = {weight.layer for weight in weights}
    numbers = in_layers if layers is None else set(expand(layers, "layers"))
    if outside := sorted(numbers - in_layers):
        raise ValueError(f"layers names {outside[0]}, but the last layer of {disk.path} is {max(in_layers)}")
    return [weight for weight in weights if weight.layer in numbers and disk.component(weight.name) in wanted]


def _common_shape(tuned: MatrixReader, base: MatrixReader, weight: DiskWeight) -> Shape:
    if weight.name not in base.disk.weights:
        raise CheckpointError(f"{base.disk.path} lacks {weight.name}, which {tuned.disk.path} has; are they kin?")
    shapes = tuned.shape(weight), base.shape(base.disk.weights[weight.name])
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{weight.name} is {shapes[0]} in {tuned.disk.path} and {shapes[1]} in {base.disk.path}; was the one tuned "
            "from the other?"
        )
    return shapes[0]


def _difference(tuned: MatrixReader, base: MatrixReader, weight: DiskWeight, expert: int | None) -> Tensor:
    found = tuned.matrix(weight, expert) - base.matrix(base.disk.weights[weight.name], expert)
    if not bool(torch.isfinite(found).all()):
        which = "" if expert is None else f" of expert {expert}"
        raise CheckpointError(f"{weight.name}{which} is not finite in {tuned.disk.path} or {base.disk.path}")
    return found


def _generator(key: str) -> torch.Generator:
    """A sketch of its own for every matrix, whatever was decomposed before it."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def _write(file: TensorFile, name: str, found: Truncated, expert: int) -> None:
    for part, value in zip(PARTS, (found.u, found.s, found.v, torch.tensor([found.residual])), strict=True):
        file.write(f"{name}.{part}", value, expert)
