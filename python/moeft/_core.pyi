"""Native core of moeft. Private: use the public functions of the package.

Arrays are C-contiguous numpy arrays (or any object with the buffer protocol); outputs are allocated by
the caller, must be writable and must not overlap another argument. 16-bit floats are passed as their bits
in uint16 arrays, together with ``dtype``. The GIL is released during the work: no other thread may write
to the arrays meanwhile.

Every function raises ``TypeError`` for an array of another element type and ``ValueError`` for a length,
an overlap or a value that does not fit.
"""

from typing import Any, Literal

from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

# numpy declares the buffer protocol to type checkers only from Python 3.12 on.
_Array = NDArray[Any] | Buffer
_WeightDtype = Literal["float32", "bfloat16", "float16"]

def nf4_quantize(
    values: _Array,
    dtype: _WeightDtype,
    groups: int,
    group_len: int,
    block_size: int,
    packed: _Array,
    absmax: _Array,
) -> None:
    """Quantise ``values`` to NF4, byte-identical to bitsandbytes on each group.

    Args:
        values: ``groups * group_len`` values, float32 or uint16 by ``dtype``.
        dtype: Element type of ``values``.
        groups: Experts of a stack, or 1. A block never crosses a group.
        group_len: Values per group.
        block_size: Values per scale, a power of two from 32 to 4096.
        packed: Output, uint8, ``groups * ceil(group_len / 2)``; the first value is the high nibble.
        absmax: Output, float32, ``groups * ceil(group_len / block_size)``.
    """

def nf4_dequantize(
    packed: _Array,
    absmax: _Array,
    groups: int,
    group_len: int,
    block_size: int,
    out: _Array,
    dtype: _WeightDtype,
) -> None:
    """Restore NF4 values: code times absmax in float32, rounded once to ``dtype``.

    Args:
        packed: uint8, ``groups * ceil(group_len / 2)``.
        absmax: float32, ``groups * ceil(group_len / block_size)``.
        groups: Experts of a stack, or 1.
        group_len: Values per group.
        block_size: Values per scale, a power of two from 32 to 4096.
        out: Output, ``groups * group_len`` values, float32 or uint16 by ``dtype``.
        dtype: Element type of ``out``.
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

def bucket(expert_index: _Array, num_experts: int, permutation: _Array, inverse: _Array, offsets: _Array) -> None:
    """Sort R rows by expert; rows of one expert keep their order.

    Args:
        expert_index: int32 or int64, R experts in ``0 .. num_experts - 1``.
        num_experts: Number of experts.
        permutation: Output, int64, R: row at each sorted position.
        inverse: Output, int64, R: sorted position of each row.
        offsets: Output, int32, ``num_experts + 1``: where each expert starts, then R.
    """
