"""Models as GGUF, the file of llama.cpp: no torch, no intermediate file, bounded memory.

Names and metadata are put together here; the Rust core reads, quantises and writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moeft import _core
from moeft.errors import CheckpointError
from moeft.families import for_model_type
from moeft.gguf.architectures import architecture_of
from moeft.gguf.config import TextConfig
from moeft.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from moeft.gguf.metadata import metadata, rope_factors
from moeft.gguf.split import parts
from moeft.gguf.tensors import Spec, TensorNames
from moeft.gguf.tokenizer import tokenizer_metadata
from moeft.gguf.weight_names import WeightNames, weight_names
from moeft.progress_bar import Callback, byte_bar

__all__ = [
    "FILE_TYPES",
    "ExportReport",
    "FileType",
    "ImportanceMatrix",
    "TensorReport",
    "WeightNames",
    "export",
    "parts",
    "plan",
    "read_header",
    "read_imatrix",
    "weight_names",
    "write_imatrix",
]

FileType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)


@dataclass(frozen=True)
class TensorReport:
    """One tensor: name, shape (slowest axis first), type and bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote, or :func:`plan` would. ``str()`` is a table.

    Attributes:
        files: The files, in order.
        tensors: The tensors, in order.
        bytes: Length of all files.
        bits_per_weight: Bits of all tensors over their number of values.
        seconds: Wall time; 0 of a plan.
    """

    files: tuple[str, ...]
    tensors: tuple[TensorReport, ...]
    bytes: int
    bits_per_weight: float
    seconds: float

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the tensors of each type, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.type] += tensor.bytes
        return dict(sizes.most_common())

    def __str__(self) -> str:
        counts = Counter(tensor.type for tensor in self.tensors)
        lines = [f"{'type':<8}{'tensors':>8}{'bytes':>18}"]
        lines += [f"{name:<8}{counts[name]:>8}{size:>18,}" for name, size in self.bytes_by_type().items()]
        lines += [f"{'total':<8}{len(self.tensors):>8}{self.bytes:>18,}  {self.bits_per_weight:.2f} bits per weight"]
        return "\n".join([*lines, *self.files])


def export(
    model: str | Path,
    out: str | Path,
    *,
    type: FileType = "q4_k_m",
    tensor_types: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    imatrix: str | Path | None = None,
    adapter: str | Path | None = None,
    threads: int | None = None,
    progress: bool | Callback = False,
) -> ExportReport:
    """Write a 16- or 32-bit checkpoint as GGUF, in bounded memory and with the bytes that llama.cpp would write.

    An export that was interrupted goes on where it was when the same one is started again.

    Args:
        model: Folder of the checkpoint, with ``tokenizer.json``.
        out: File to write, ``*.gguf``; must not exist.
        type: Type of the file, as llama.cpp names them; it chooses the type of each tensor as llama.cpp does.
        tensor_types: Regular expression of tensor names -> type; the first that is found in a name wins.
        max_shard_bytes: A file is closed before its tensors take more; None writes one file.
        imatrix: Importance matrix, a GGUF file of :mod:`moeft.runs.imatrix` or llama.cpp.
        adapter: Folder of an adapter that was trained on the checkpoint: its merged weights are written.
        threads: Most threads to use; all cores if None.
        progress: Draw a progress bar; or called with (done, total, what) in bytes, and stops the export by raising.

    Raises:
        CheckpointError: If the checkpoint is incomplete, damaged or packed, or holds values that are not finite.
        AdapterError: If the adapter does not fit.
        UnsupportedModelError: If moeft does not know how llama.cpp names the tensors of this model.
        ValueError: If an option does not fit.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
    document, options = _model(Path(model)), _options(type, tensor_types, max_shard_bytes, imatrix, adapter)
    threads = threads or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    with byte_bar("export", progress is True) as bar:
        callback = progress if callable(progress) else bar
        report = _core.gguf_write(str(model), str(out), document, options, threads, callback)
    return _report(report)


def plan(
    model: str | Path,
    out: str | Path = "model.gguf",
    *,
    type: FileType = "q4_k_m",
    tensor_types: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    imatrix: str | Path | None = None,
    adapter: str | Path | None = None,
) -> ExportReport:
    """What :func:`export` would write, from the headers alone. Arguments and errors as there."""
    options = _options(type, tensor_types, max_shard_bytes, imatrix, adapter)
    return _report(_core.gguf_plan(str(model), str(out), _model(Path(model)), options))


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a GGUF file: ``version``, ``metadata`` as (key, typed value), ``tensors`` with their places.

    Raises:
        CheckpointError: If the file is damaged or no GGUF file.
    """
    found: dict[str, Any] = json.loads(_core.gguf_header(str(path)))
    return found


def _model(folder: Path) -> str:
    """The model in llama.cpp's names, as JSON for the Rust core."""
    config = TextConfig(folder)
    family = for_model_type(config.model_type)
    architecture = architecture_of(family)
    title = folder.resolve().name
    keys = metadata(architecture.name, config, title) + tokenizer_metadata(folder, architecture.tokenizer, config)
    shapes = {tensor["name"]: tensor["shape"] for tensor in json.loads(_core.tensors(str(folder)))}
    tied = bool(config.get("tie_word_embeddings", default=architecture.name.startswith("gemma")))
    specs = TensorNames(architecture, family, shapes, config.head_dim, tied).specs()
    layers = int(config.get("num_hidden_layers"))
    _check_layers(specs, layers, folder)
    experts = config.get("num_experts", "num_local_experts", default=0) if architecture.experts else 0
    _check_sizes(specs, int(config.get("vocab_size")), int(experts or 0), folder)
    factors = rope_factors(architecture.name, config)
    if factors:
        specs.insert(0, Spec("rope_freqs.weight", [len(factors)], values=factors))
    document = {
        "metadata": keys,
        "tensors": [spec.as_json() for spec in specs],
        "num_layers": layers,
        "num_experts": int(experts or 0),
    }
    return json.dumps(document)


def _check_layers(specs: list[Spec], layers: int, folder: Path) -> None:
    found = {int(spec.name.split(".")[1]) for spec in specs if spec.name.startswith("blk.")}
    if found != set(range(layers)):
        raise CheckpointError(f"{folder} has layers {sorted(found)}, expected 0 to {layers - 1} as in its config.json")


def _check_sizes(specs: list[Spec], vocab_size: int, experts: int, folder: Path) -> None:
    """llama.cpp says of such a file only that a tensor has the wrong shape."""
    for spec in specs:
        expected = (
            vocab_size if spec.name == "token_embd.weight" else experts if "_exps." in spec.name else spec.shape[0]
        )
        if spec.shape[0] != expected:
            what = "rows" if spec.name == "token_embd.weight" else "experts"
            raise CheckpointError(
                f"{folder}: {spec.name} has {spec.shape[0]} {what}, expected {expected} as in its config.json; take "
                "weights and configuration from the same checkpoint"
            )


def _options(
    type: FileType,
    tensor_types: Mapping[str, str] | None,
    max_shard_bytes: int | None,
    imatrix: str | Path | None,
    adapter: str | Path | None,
) -> str:
    if type not in FILE_TYPES:
        raise ValueError(f"type is {type!r}, expected one of {', '.join(FILE_TYPES)}")
    options = {
        "file_type": type,
        "tensor_types": [(pattern, kind.lower()) for pattern, kind in (tensor_types or {}).items()],
        "max_shard_bytes": max_shard_bytes or 0,
        "imatrix": None if imatrix is None else str(imatrix),
        "adapter": None if adapter is None else str(adapter),
    }
    return json.dumps(options)


def _report(text: str) -> ExportReport:
    report = json.loads(text)
    tensors = tuple(TensorReport(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in report.pop("tensors"))
    return ExportReport(tensors=tensors, **{**report, "files": tuple(report["files"])})
