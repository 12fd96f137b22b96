"""Every kernel at the model's shapes, beside the definitions, before anything is timed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpu_attention
from gpu_harness import Bench, relative
from moeft.kernels import ExpertLora, LoraFactors, experts, linear_log_probs, nf4
from moeft.kernels.grouped_linear import gpu as grouped
from moeft.kernels.grouped_linear import reference as grouped_reference
from moeft.kernels.grouped_outer.gpu import grouped_outer
from moeft.kernels.nf4 import gpu as nf4_gpu
from moeft.kernels.nf4 import reference as nf4_reference
from moeft.kernels.rms_norm import gpu as rms_norm_gpu
from moeft.kernels.rms_norm import reference as rms_norm_reference
from moeft.kernels.routing import gpu as routing
from moeft.kernels.routing import reference as routing_reference

# One bf16 rounding is 0.0017 relative RMS; up to ten in a row add in quadrature; twice that.
BF16 = 2 * 0.0017 * 10**0.5
FLOAT32 = 3e-5  # sums of 2,816 products
GELU = torch.nn.GELU(approximate="tanh")


Check = tuple[str, Callable[[], float]]


def run(bench: Bench) -> bool:
    """Check all, one line each, whatever becomes of the others; False if one is red."""
    green = True
    most = BF16 if bench.shapes.dtype == torch.bfloat16 else FLOAT32
    for name, check in _checks(bench):
        record: dict[str, Any] = {"kernel": name, "passed": False}
        try:
            error = check()
            record |= {"relative_error": error, "passed": error <= (0 if name.startswith("bits of") else most)}
        except Exception as error:  # such as a kernel that this GPU's compiler refuses
            record |= {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-2000:]}
        green &= record["passed"]
        bench.write("correctness", **record)
    return green


def _checks(bench: Bench) -> Iterator[Check]:
    """Name and relative error of each kernel; 0 or 1 where bits must be equal."""
    shapes, dtype = bench.shapes, bench.shapes.dtype
    up, down = _stacks(bench)
    yield "bits of dequantize", lambda: float(any(not _equal_bits(w, dtype) for w in (up, down)))
    for tokens in (1, 37, max(shapes.tokens)):
        index = bench.routing(tokens)
        yield f"bits of routing, {tokens} tokens", lambda i=index: _different_buckets(i, shapes.experts)
    yield from _products(bench, up, down)
    for name, index in _decisions(bench):
        yield f"expert block, {name}", lambda i=index: _block(bench, up, down, i)
    yield "loss head", lambda: _loss_head(bench)
    for layer in gpu_attention.layers(bench):
        for rows, lengths in gpu_attention.packs(bench).items():
            yield f"attention, {layer.name}, {rows}", lambda s=layer, n=lengths: _attention(bench, s, n)
    for name, offset, rounds in (("", 0.0, False), (" less one", 1.0, False), (" rounded before", 0.0, True)):
        for shape in ((333, shapes.hidden), (64, 16, 256)):
            yield f"norm{name} of {shape[-1]}", lambda n=shape, o=offset, r=rounds: _norm(bench, n, o, r)


def _different_buckets(index: Tensor, experts: int) -> float:
    found, expected = (path.bucket(index.flatten(), experts) for path in (routing, routing_reference))
    return float(not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))


def _stacks(bench: Bench) -> tuple[nf4.NF4Weight, nf4.NF4Weight]:
    s = bench.shapes
    return bench.packed(s.experts, 2 * s.inner, s.hidden), bench.packed(s.experts, s.hidden, s.inner)


def _equal_bits(weight: nf4.NF4Weight, dtype: torch.dtype) -> bool:
    out = torch.full(weight.shape, float("nan"), dtype=dtype, device=weight.device)
    nf4_gpu.dequantize(weight, out)
    nested = weight.nested
    dynamic_map = nf4.cpu.dynamic_map().to(weight.device)
    absmax = nf4_reference.restore_absmax(weight.absmax, nested.absmax, nested.offset, dynamic_map)
    for expert in range(0, weight.shape[0], 16):  # a definition of the whole stack takes 12 bytes a value
        layout = nf4.Layout.of((1, *weight.shape[1:]), weight.block_size)
        expected = nf4_reference.dequantize(weight.packed[expert], absmax[expert], layout, dtype)
        if not torch.equal(out[expert].flatten(), expected.flatten()):
            return False
    return True


def _products(bench: Bench, up: nf4.NF4Weight, down: nf4.NF4Weight) -> Iterator[Check]:
    tokens, s = 333, bench.shapes
    tokens = min(tokens, 4 * max(s.tokens))
    rows = tokens * s.top_k
    _, _, offsets = routing.bucket(bench.routing(tokens).flatten(), s.experts)
    tiles = grouped.Tiles.of(offsets, rows)
    low, factor = bench.randn(rows, s.rank), bench.randn(s.experts, 2 * s.inner, s.rank) * 0.02
    a = bench.randn(s.experts, s.rank, s.hidden) * 0.02
    x, g = bench.randn(rows, s.hidden), bench.randn(rows, 2 * s.inner)
    weight = nf4.dequantize(up, dtype=bench.shapes.dtype).float()
    forward = grouped_reference.grouped_linear(x.float(), weight, offsets)
    forward += 0.5 * grouped_reference.grouped_linear(low.float(), factor.float(), offsets)
    back = grouped_reference.grouped_linear(g.float(), weight.mT, offsets)
    back += 0.5 * grouped_reference.grouped_linear(low.float(), a.float().mT, offsets)
    for path in ("fused", "workspace", "grouped_mm"):
        for name, rows_in, transpose, expected, extra in (
            ("", x, False, forward, grouped.LowRank(low, factor, 0.5)),
            (" transposed", g, True, back, grouped.LowRank(low, a, 0.5)),
        ):
            product = partial(
                grouped.grouped_linear, rows_in, up, tiles, transpose=transpose, low_rank=extra, path=path
            )
            yield f"grouped linear{name}, {path}", lambda p=product, e=expected: relative(p(), e)
    outer = grouped_reference.grouped_outer(low.float(), x.float(), offsets)
    yield "grouped outer", lambda: relative(grouped_outer(low, x, offsets), outer)


def _decisions(bench: Bench) -> Iterator[tuple[str, Tensor]]:
    s = bench.shapes
    tokens = min(512, max(s.tokens))
    yield "skewed", bench.routing(tokens)
    one = torch.arange(s.top_k, device=bench.device).repeat(tokens, 1)
    yield "the same experts for all", one
    yield "one token", bench.routing(1)


def _block(bench: Bench, up: nf4.NF4Weight, down: nf4.NF4Weight, index: Tensor) -> float:
    """The largest relative error among output and gradients, beside PyTorch's operations."""
    s = bench.shapes
    x, grad = bench.randn(index.shape[0], s.hidden), bench.randn(index.shape[0], s.hidden)
    weights = torch.rand(index.shape, device=bench.device)
    factors = [
        bench.randn(*shape, dtype=torch.float32) * 0.02
        for shape in (
            (s.experts * s.rank, s.hidden),
            (2 * s.inner, s.rank * s.experts),
            (s.experts * s.rank, s.inner),
            (s.hidden, s.rank * s.experts),
        )
    ]

    def results() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weights, *factors)]
        lora = ExpertLora(LoraFactors(*leaves[2:4], 0.5), LoraFactors(*leaves[4:], 2.0))
        out = experts(leaves[0], index, leaves[1], up, down, GELU, lora)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    ours = results()
    with _by_pytorch():
        theirs = results()
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def _attention(bench: Bench, layer: gpu_attention.Layer, lengths: Sequence[int]) -> float:
    """The largest relative error among output and gradients, beside a mask in float32."""
    inside, masked, leaves = gpu_attention.paths(bench, layer, lengths, 1)

    def results(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, inputs[0].detach())]

    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    return max(relative(a, b) for a, b in zip(results(inside, leaves), results(masked, exact), strict=True))


def _loss_head(bench: Bench) -> float:
    s = bench.shapes
    rows = min(700, 4 * max(s.tokens))
    hidden, head = bench.randn(rows, s.hidden), bench.randn(s.vocabulary, s.hidden) * 0.02
    labels = torch.randint(0, s.vocabulary, (rows,), device=bench.device)
    labels[::3] = -100
    coefficients = bench.randn(rows, dtype=torch.float32)

    def results() -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        out = linear_log_probs(leaf, head, labels, 30.0)
        (out * coefficients).sum().backward()
        return out.detach(), leaf.grad

    ours = results()
    with _by_pytorch():
        theirs = results()
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def _norm(bench: Bench, shape: tuple[int, ...], offset: float, rounds_before_weight: bool) -> float:
    """The largest relative error of output and gradients, of the weight too, beside the definition."""
    x, grad, weight = bench.randn(*shape), bench.randn(*shape), bench.randn(shape[-1])

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = function(*leaves, 1e-6, offset, rounds_before_weight)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    found, expected = (results(path.rms_norm) for path in (rms_norm_gpu, rms_norm_reference))
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def _by_pytorch() -> Iterator[None]:
    before = os.environ.get("MOEFT_KERNELS")
    os.environ["MOEFT_KERNELS"] = "pytorch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOEFT_KERNELS"]
        else:
            os.environ["MOEFT_KERNELS"] = before
