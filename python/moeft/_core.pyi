"""Native core of moeft. Private: use the public functions of the package.

Arrays are C-contiguous numpy arrays (or any object with the buffer protocol); outputs are allocated by
the caller, must be writable and must not overlap another argument. 16-bit floats are passed as their bits
in uint16 arrays, together with ``dtype``. The GIL is released during the work: no other thread may write
to the arrays meanwhile.

Every function raises ``TypeError`` for an array of another element type and ``ValueError`` for a length,
an overlap or a value that does not fit.
"""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

# numpy declares the buffer protocol to type checkers only from Python 3.12 on.
_Array = NDArray[Any] | Buffer
_WeightDtype = Literal["float32", "bfloat16", "float16"]
_Codebook = Literal["nf4", "fp4"]
_GgmlType = Literal["f32", "f16", "bf16", "q4_0", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]

_Path = str | PathLike[str]

_Progress = Callable[[int, int, str], object]

def instruction_set() -> str:
    """Return "scalar", "avx2" or "avx512": the largest that the CPU has, or what ``MOEFT_ISA`` names."""

def has_bf16_instructions() -> bool:
    """Return whether this CPU multiplies bf16 directly (AVX512-BF16, AMX)."""

def nf4_quantize(
    values: _Array,
    dtype: _WeightDtype,
    groups: int,
    group_len: int,
    block_size: int,
    codebook: _Codebook,
    packed: _Array,
    absmax: _Array,
    threads: int,
) -> None:
    """Quantise ``values`` to 4 bits, byte-identical to bitsandbytes on each group.

    Args:
        values: ``groups * group_len`` values, float32 or uint16 by ``dtype``.
        dtype: Element type of ``values``.
        groups: Experts of a stack, or 1. A block never crosses a group.
        group_len: Values per group.
        block_size: Values per scale, a power of two from 32 to 4096.
        codebook: The sixteen values.
        packed: Output, uint8, ``groups * ceil(group_len / 2)``; the first value is the high nibble.
        absmax: Output, float32, ``groups * ceil(group_len / block_size)``; not finite where a value is not.
        threads: Most threads to use.
    """

def nf4_dequantize(
    packed: _Array,
    absmax: _Array,
    absmax2: _Array | None,
    offset: float,
    groups: int,
    group_len: int,
    block_size: int,
    codebook: _Codebook,
    out: _Array,
    dtype: _WeightDtype,
    threads: int,
) -> None:
    """Restore 4-bit values: code times absmax in float32, rounded once to ``dtype``.

    Args:
        packed: uint8, ``groups * ceil(group_len / 2)``.
        absmax: ``groups * ceil(group_len / block_size)``; float32, or uint8 codes of ``nf4_nest`` with ``absmax2``.
        absmax2: float32, ``ceil(len(absmax) / 256)``, or None.
        offset: As returned by ``nf4_nest``; not used without ``absmax2``.
        groups: Experts of a stack, or 1.
        group_len: Values per group.
        block_size: Values per scale, a power of two from 32 to 4096.
        codebook: The sixteen values.
        out: Output, ``groups * group_len`` values, float32 or uint16 by ``dtype``. If it exceeds the last-level cache
            it is written past it.
        dtype: Element type of ``out``.
        threads: Most threads to use.
    """

def nf4_first_non_finite(values: _Array, dtype: _WeightDtype) -> int | None:
    """Return the position of the first infinite or NaN value, or None.

    Args:
        values: float32 or uint16 by ``dtype``.
        dtype: Element type of ``values``.
    """

def nf4_nest(absmax: _Array, codes: _Array, absmax2: _Array, offset: float | None = None) -> float:
    """Store ``absmax`` in 8 bits, byte-identical to bitsandbytes for the same offset.

    Args:
        absmax: float32, finite.
        codes: Output, uint8, as long as ``absmax``.
        absmax2: Output, float32, ``ceil(len(absmax) / 256)``.
        offset: Subtracted first; by default the mean of ``absmax``, summed in float64 and rounded to
            float32. The last bit of torch's float32 mean, which bitsandbytes takes, depends on the CPU.

    Returns:
        The offset used.
    """

def nf4_unnest(codes: _Array, absmax2: _Array, offset: float, out: _Array) -> None:
    """Restore absmax from its 8-bit form: code times scale, then plus offset, each rounded to float32.

    Args:
        codes: uint8.
        absmax2: float32, ``ceil(len(codes) / 256)``.
        offset: As returned by ``nf4_nest``.
        out: Output, float32, as long as ``codes``.
    """

def bucket(top_k_index: _Array, num_experts: int, permutation: _Array, inverse: _Array, offsets: _Array) -> None:
    """Sort R rows by expert; rows of one expert keep their order.

    Args:
        top_k_index: int32 or int64, R experts in ``0 .. num_experts - 1``.
        num_experts: Number of experts.
        permutation: Output, int64, R: row at each sorted position.
        inverse: Output, int64, R: sorted position of each row.
        offsets: Output, int32, ``num_experts + 1``: where each expert starts, then R.
    """

def load_statistics(offsets: _Array) -> tuple[float, float, float]:
    """Say how evenly rows are spread over E experts.

    Args:
        offsets: int32, E + 1 values as ``bucket`` fills them.

    Returns:
        Entropy of the shares in nats; the same divided by ``ln E``; standard deviation of the counts over their mean.
    """

def gguf_quantize(
    values: _Array, kind: _GgmlType, row_len: int, importance: _Array | None, blocks: _Array, threads: int
) -> None:
    """Quantise rows of float32 to GGUF blocks, byte-identical to ggml on x86-64.

    Args:
        values: float32, finite, whole rows.
        kind: Type of the blocks.
        row_len: Values per row, whole blocks.
        importance: float32, ``row_len`` weights of the columns' errors (llama.cpp's imatrix), or None.
        blocks: Output, uint8.
        threads: Most threads to use.
    """

def gguf_dequantize(blocks: _Array, kind: _GgmlType, values: _Array) -> None:
    """Restore float32 ``values`` from GGUF blocks."""

def gguf_plan(source: _Path, out: _Path, model: str, options: str) -> str:
    """Return the report of a GGUF file as JSON without writing it; arguments as in ``gguf_write``."""

def gguf_write(
    source: _Path, out: _Path, model: str, options: str, threads: int, progress: _Progress | None = None
) -> str:
    """Write a checkpoint as GGUF; return the report as JSON.

    Args:
        source: Folder of the checkpoint.
        out: File to write.
        model: JSON of metadata, tensors and sizes; ``moeft_core::gguf::export::Model``.
        options: JSON of the types; ``moeft_core::gguf::export::Options``.
        threads: Most threads to use.
        progress: Called with (done, total, what).
    """

def gguf_header(path: _Path) -> str:
    """Return the header of a GGUF file as JSON."""

def gguf_encode_header(metadata: str, tensors: str) -> bytes:
    """Return the header of a GGUF file of float32 tensors that follow each other, each padded to 32 bytes.

    Args:
        metadata: JSON of keys and typed values, in order.
        tensors: JSON list of (name, shape), in order.
    """

def grouped_linear(
    x: _Array, dtype: _WeightDtype, offsets: _Array, stack: Any, transpose: bool, out: _Array, threads: int
) -> None:
    """Multiply each expert's block of rows by that expert's weight; products are summed in float32.

    Args:
        x: Rows sorted by expert, float32 or uint16 by ``dtype``.
        dtype: Element type of ``x`` and ``out``.
        offsets: int32, start of each expert's block, then the number of rows.
        stack: A ``Stack`` of ``moeft/kernels/grouped_linear/cpu.py``.
        transpose: Multiply by the weight instead of its transpose.
        out: Output, as many rows.
        threads: Most threads to use.
    """

def experts_forward(block: Any, x: _Array, h: _Array | None, out: _Array, threads: int) -> None:
    """Send tokens through their experts and add up the weighted results.

    Args:
        block: A ``Block`` of ``moeft/kernels/experts/cpu.py``.
        x: ``[T, H]`` tokens, float32 or uint16 by ``block.dtype``, as all arrays of rows.
        h: Output, ``[R, 2I]`` inputs of the activation for backward, or None.
        out: Output, ``[T, H]``.
        threads: Most threads to use.
    """

def experts_backward(
    block: Any,
    x: _Array,
    h: _Array,
    grad: _Array,
    grad_x: _Array | None,
    grad_weights: _Array,
    grad_gate_up: tuple[_Array, _Array] | None,
    grad_down: tuple[_Array, _Array] | None,
    threads: int,
) -> None:
    """Compute the gradients of an expert block.

    Args:
        block: As given to ``experts_forward``.
        x: As given to ``experts_forward``.
        h: As written by ``experts_forward``.
        grad: ``[T, H]`` gradient of the output.
        grad_x: Output, ``[T, H]``, or None.
        grad_weights: Output, float32, gradient of each row's routing weight.
        grad_gate_up: Outputs, float32, gradients of A and B of gate_up, or None.
        grad_down: Outputs, float32, gradients of A and B of down, or None.
        threads: Most threads to use.
    """

def adamw_step(
    param: _Array,
    grad: _Array,
    exp_avg: _Array,
    exp_avg_sq: _Array,
    exp_avg_absmax: _Array | None,
    exp_avg_sq_absmax: _Array | None,
    rounded: _Array | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    threads: int,
) -> None:
    """Update weights and moments by one step of AdamW. All CPUs and numbers of threads give the same bits.

    Args:
        param: Weights, changed; float32, or bfloat16 as uint16.
        grad: Gradients of the weights; float32, or bfloat16 as uint16.
        exp_avg: Mean of gradients, changed; float32, or uint8 codes if ``exp_avg_absmax`` is given.
        exp_avg_sq: Mean of their squares, changed; of the same type.
        exp_avg_absmax: float32, one scale per 256 codes of ``exp_avg``, changed.
        exp_avg_sq_absmax: The same for ``exp_avg_sq``.
        rounded: Output, uint16: the new weights as bfloat16; only for float32 ``param``.
        lr: Learning rate.
        beta1: Decay of ``exp_avg``, in [0, 1).
        beta2: Decay of ``exp_avg_sq``, in [0, 1).
        eps: Added to the root of the corrected mean of squares.
        weight_decay: Weights lose this part of themselves times ``lr``.
        step: Number of this step, from 1.
        threads: Most threads to use.
    """

def rms_norm_forward(
    x: _Array, weight: _Array | None, eps: float, out: _Array, rstd: _Array, hidden: int, threads: int
) -> None:
    """Normalise rows: ``x * rstd * weight`` with ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    Args:
        x: ``rows * hidden`` values, float32.
        weight: ``hidden``, float32, or None for ones.
        eps: Added to the mean of squares.
        out: Output, float32, as long as ``x``.
        rstd: Output, float32, ``rows``.
        hidden: Length of a row.
        threads: Most threads to use.
    """

def rms_norm_backward(
    x: _Array, weight: _Array | None, rstd: _Array, grad: _Array, grad_x: _Array, hidden: int, threads: int
) -> None:
    """Gradient of the rows that ``rms_norm_forward`` normalised.

    Args:
        x: As given to ``rms_norm_forward``.
        weight: As given to ``rms_norm_forward``.
        rstd: What ``rms_norm_forward`` wrote.
        grad: Gradient of its output, float32.
        grad_x: Output, float32, as long as ``x``.
        hidden: Length of a row.
        threads: Most threads to use.
    """

def log_probs_and_gradient(
    logits: _Array, targets: _Array, softcap: float | None, log_probs: _Array, threads: int
) -> None:
    """Log-probability of each row's label under ``softmax(softcap * tanh(logits / softcap))``, and its gradient.

    Args:
        logits: ``rows * vocabulary`` values, float32; becomes the gradient with respect to them.
        targets: Label of each row, int64.
        softcap: Soft cap of the logits, or None.
        log_probs: Output, float32, as long as ``targets``.
        threads: Most threads to use.
    """

def blockwise_quantize(values: _Array, signed: bool, codes: _Array, absmax: _Array) -> None:
    """Store values in 8 bits as bitsandbytes does on the CPU, but zero as zero.

    Args:
        values: float32.
        signed: Whether codes mean values in [-1, 1] or in [0, 1] of the scale.
        codes: Output, uint8, as long as ``values``.
        absmax: Output, float32, ``ceil(len(values) / 256)``.
    """

def blockwise_dequantize(codes: _Array, absmax: _Array, signed: bool, out: _Array) -> None:
    """Restore values from 8 bits: what the code means times the scale, in float32.

    Args:
        codes: uint8.
        absmax: float32, ``ceil(len(codes) / 256)``.
        signed: As in ``blockwise_quantize``.
        out: Output, float32, as long as ``codes``.
    """

def fingerprint(path: _Path) -> str:
    """Name the content of a checkpoint folder or safetensors file, whatever its sharding.

    Returns:
        ``sampled-v1:`` and 64 hex digits: SHA-256 over all tensors sorted by name, each with name, dtype, shape, and
        the first, middle and last 4 KiB of its content.

    Raises:
        CheckpointError: If the checkpoint is incomplete or damaged.
        OSError: If a file cannot be read.
    """

def checksum(path: _Path) -> str:
    """Checksum of the bytes of a safetensors file, 32 hex digits, as the manifest of a merge has it.

    XXH3, 128 bits, of the header and of each tensor.

    Raises:
        CheckpointError: If the file is damaged.
        OSError: If it cannot be read.
    """

def tensors(path: _Path) -> str:
    """List the tensors of a checkpoint folder or safetensors file, sorted by name; reads headers only.

    Returns:
        JSON list of objects with ``name``, ``dtype`` (safetensors' names), ``shape``, ``bytes`` and ``file``.

    Raises:
        CheckpointError: If the checkpoint is incomplete or damaged.
        OSError: If a file cannot be read.
    """

def stamp_metadata(path: _Path, entries: dict[str, str]) -> None:
    """Add ``entries`` to the ``__metadata__`` of a safetensors file, replacing those of the same key.

    The tensors are streamed to a sibling that then takes the name: a reader sees the old file or the new one.

    Raises:
        CheckpointError: If the file is damaged.
        OSError: If it cannot be read or written; the old file is left as it was.
    """

def quantize_checkpoint(source: _Path, out: _Path, options: str, progress: _Progress | None = None) -> str:
    """Pack a 16- or 32-bit checkpoint folder into a new NF4 checkpoint folder, in bounded memory.

    Writes to ``OUT.partial`` and renames it when everything is on the disk; the same call after an interruption goes
    on where it was.

    Args:
        source: Folder with config.json and safetensors weights.
        out: Folder to write; must not exist or be empty.
        options: JSON object with any of ``experts`` (true), ``attention`` (false), ``mlp`` (false), ``double_quant``
            (false), ``block_size`` (64) and ``max_shard_bytes`` (4 GiB).
        progress: Called with bytes done, bytes in all and the tensor at hand, at most 20 times a second; what it
            raises stops the work and is raised here.

    Returns:
        JSON report: ``out``, ``components`` (bytes before and after of experts, attention, mlp, router, embeddings,
        other), ``total``, ``weights_packed``, ``tensors_copied``, ``shards_resumed``, ``bytes_resumed``, ``seconds``,
        ``base_fingerprint``.

    Raises:
        CheckpointError: If the source is damaged, packed already or not finite, or ``out`` is not empty.
        UnsupportedModelError: If no family file knows the ``model_type``.
        ValueError: If ``options`` cannot be used.
        OSError: If a file cannot be read or written, or the disk is too small.
    """

def merge_checkpoint(
    recipe: str,
    folder: _Path,
    out: _Path,
    progress: _Progress | None = None,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
) -> str:
    """Merge models and LoRA adapters, in bounded memory, in the layout of the base.

    Writes to ``OUT.partial`` and renames it when everything is on the disk; the same call after an interruption goes
    on where it was. The bytes do not depend on ``threads``.

    Args:
        recipe: YAML or JSON text.
        folder: Where relative paths in the recipe start.
        out: Folder to write; must not exist or be empty.
        progress: As in ``quantize_checkpoint``.
        max_shard_bytes: Cut the output into files of at most this size; None keeps the files of the base.
        threads: Threads that read and compute; None takes all cores.

    Returns:
        JSON report: ``out``, ``method``, ``tensors_merged``, ``tensors_copied``, ``bytes``, ``shards_resumed``,
        ``bytes_resumed``, ``seconds``, ``merged`` (by tensor: ``branch`` where the values decide it, ``max_delta``,
        ``max_weight``, ``norm_ratio``, ``cosine``), ``base_fingerprint``, ``base_check`` (``verified``,
        ``unverified`` or ``no_adapter``).

    Raises:
        RecipeError: If the recipe has an unknown key or a value that cannot be used.
        AdapterError: If an adapter does not fit the base, or cannot be merged.
        CheckpointError: If a checkpoint is damaged or packed, does not fit the base, or ``out`` is not empty.
        UnsupportedModelError: If no family file knows the ``model_type``.
        OSError: If a file cannot be read or written, or the disk is too small.
    """

def plan_merge(recipe: str, folder: _Path, max_shard_bytes: int | None = None) -> str:
    """Open and check all inputs of a merge and say what it would do.

    Args:
        recipe: YAML or JSON text.
        folder: Where relative paths in the recipe start.
        max_shard_bytes: As in ``merge_checkpoint``.

    Returns:
        JSON: ``method``, ``tensors`` (``name``, ``file``, ``action``, ``inputs``, ``read_bytes``, ``written_bytes``),
        ``files`` (pairs of name and bytes), ``read_bytes``, ``written_bytes``, ``memory_bytes``.

    Raises:
        MoeftError, OSError: As ``merge_checkpoint`` before it writes.
    """

def check_merge(recipe: str, folder: _Path) -> None:
    """Refuse a merge recipe that cannot be used, without looking at its inputs.

    Args:
        recipe: Recipe in YAML or JSON.
        folder: Where relative paths in the recipe start.

    Raises:
        RecipeError: If it has an unknown key or a value that cannot be used.
    """

def merge_command(words: list[str]) -> tuple[int, tuple[Path, Path, bool] | None]:
    """Run the ``moeft-merge`` command as ``moeft merge``; it prints to the process's own streams.

    Args:
        words: What follows the name of the command.

    Returns:
        Exit code: 0 done, 1 inputs that cannot be merged, 2 wrong usage or recipe, 3 files or disk, 130 interrupted.
        After ``--verify``, recipe and output of the merge that the caller is to verify, and whether to answer in JSON.
    """

def convert_layout(
    source: _Path, out: _Path, direction: Literal["fuse", "unfuse"], progress: _Progress | None = None
) -> str:
    """Fuse the experts of a checkpoint folder into stacks or take the stacks apart, bit for bit, in bounded memory.

    Writes to ``OUT.partial`` and renames it when everything is on the disk; the same call after an interruption goes
    on where it was.

    Args:
        source: Folder with config.json and safetensors weights.
        out: Folder to write; must not exist or be empty.
        direction: What to do.
        progress: As in ``quantize_checkpoint``.

    Returns:
        JSON report: ``out``, ``direction``, ``layers``, ``tensors_read``, ``tensors_made``, ``tensors_copied``,
        ``bytes``, ``shards_resumed``, ``bytes_resumed``, ``seconds``.

    Raises:
        CheckpointError: If experts are missing, mixed, in that layout already, packed or of shapes that do not agree,
            or ``out`` is not empty.
        UnsupportedModelError: If no family file knows the ``model_type``.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
