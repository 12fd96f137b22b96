"""Every kernel of the core on fixed inputs, without torch, which takes seconds to import and breaks in a fork."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from moeft import _core

# T tokens, K of E experts per token, H hidden, F expert hidden, R rank. Odd sizes; enough values for the pool.
T, K, E, H, F, R = 70, 2, 5, 36, 21, 3
GROUPS, GROUP_LEN, BLOCK = 3, 200_001, 64

_random = np.random.default_rng(0)


def _normal(*shape: int) -> np.ndarray:
    return _random.standard_normal(shape, np.float32)


VALUES = _normal(GROUPS * GROUP_LEN)
TOP_K_INDEX = np.stack([_random.permutation(E)[:K] for _ in range(T)])
WEIGHTS = _random.random((T, K), np.float32)
X, GRAD = _normal(T, H), _normal(T, H)
GATE_UP, DOWN = _normal(E, 2 * F, H) / H**0.5, _normal(E, H, F) / F**0.5
FACTORS = [
    (_normal(E * R, H) / H**0.5, _normal(2 * F, R * E)),
    (_normal(E * R, F) / F**0.5, _normal(H, R * E)),
]


def quantize(values: np.ndarray, groups: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    length = values.size // groups
    packed = np.empty(groups * -(-length // 2), np.uint8)
    absmax = np.empty(groups * -(-length // BLOCK), np.float32)
    _core.nf4_quantize(values, "float32", groups, length, BLOCK, "nf4", packed, absmax, threads)
    return packed, absmax


def pack_and_restore(threads: int) -> list[np.ndarray]:
    """Codes and scales, and what they mean in float32, bfloat16 and float16."""
    packed, absmax = quantize(VALUES, GROUPS, threads)
    restored = []
    for dtype, carrier in (("float32", np.float32), ("bfloat16", np.uint16), ("float16", np.uint16)):
        out = np.empty(VALUES.size, carrier)
        _core.nf4_dequantize(packed, absmax, None, 0.0, GROUPS, GROUP_LEN, BLOCK, "nf4", out, dtype, threads)
        restored.append(out)
    return [packed, absmax, *restored]


def route() -> list[np.ndarray]:
    """Permutation, inverse and offsets."""
    rows = TOP_K_INDEX.size
    permutation, inverse, offsets = np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(E + 1, np.int32)
    _core.bucket(TOP_K_INDEX, E, permutation, inverse, offsets)
    return [permutation, inverse, offsets]


def expert_block(threads: int) -> list[np.ndarray]:
    """Output of packed experts with LoRA, and gradients of x, of the routing weights and of the factors."""
    permutation, _, offsets = route()
    block = SimpleNamespace(
        gate_up=_stack(GATE_UP),
        down=_stack(DOWN),
        gate_up_lora=SimpleNamespace(a=FACTORS[0][0], b=FACTORS[0][1], scaling=0.5),
        down_lora=SimpleNamespace(a=FACTORS[1][0], b=FACTORS[1][1], scaling=2.0),
        gate="silu",
        alpha=0.0,
        limit=0.0,
        interleaved=False,
        permutation=permutation,
        offsets=offsets,
        weights=WEIGHTS,
        top_k=K,
        dtype="float32",
    )
    h, out, grad_x = np.empty((T * K, 2 * F), np.float32), np.empty_like(X), np.empty_like(X)
    grad_weights = np.empty_like(WEIGHTS)
    grads = [(np.empty_like(a), np.empty_like(b)) for a, b in FACTORS]
    _core.experts_forward(block, X, h, out, threads)
    _core.experts_backward(block, X, h, GRAD, grad_x, grad_weights, *grads, threads)
    return [out, grad_x, grad_weights, *grads[0], *grads[1]]


def _stack(weight: np.ndarray) -> SimpleNamespace:
    packed, absmax = quantize(weight.reshape(-1), E, 1)
    return SimpleNamespace(
        values=packed,
        dtype="float32",
        codebook="nf4",
        shape=weight.shape,
        transposed=False,
        bias=None,
        block_size=BLOCK,
        absmax=absmax,
        nested_absmax=None,
        nested_offset=0.0,
    )


def adamw(threads: int) -> list[np.ndarray]:
    """Weights, moments and scales after two steps with 8-bit state."""
    param, grad = VALUES[:3000].copy(), VALUES[3000:6000]
    codes, scales = [np.zeros(3000, np.uint8) for _ in range(2)], [np.zeros(12, np.float32) for _ in range(2)]
    for step in (1, 2):
        _core.adamw_step(param, grad, *codes, *scales, None, 1e-2, 0.9, 0.99, 1e-6, 0.1, step, threads)
    return [param, *codes, *scales]


def run_all(threads: int) -> list[np.ndarray]:
    """Results of all of them."""
    return [*pack_and_restore(threads), *route(), *expert_block(threads), *adamw(threads)]
