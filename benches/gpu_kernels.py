"""Time the kernels: restoring, grouped products by every path, thin products, routing, loss head, norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import profiler as torch_profiler

from gpu_harness import Bench, dense
from moeft.kernels import linear_cross_entropy
from moeft.kernels import tuning as kernel_tuning
from moeft.kernels.experts import gpu
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear import gpu as grouped
from moeft.kernels.grouped_outer.gpu import grouped_outer
from moeft.kernels.nf4 import gpu as nf4_gpu
from moeft.kernels.rms_norm import gpu as rms_norm_gpu
from moeft.kernels.rms_norm import reference as rms_norm_reference
from moeft.kernels.routing import Buckets
from moeft.kernels.routing import gpu as routing
from moeft.kernels.routing import reference as routing_reference


def limits(bench: Bench) -> None:
    """The machine's own rates: a copy in memory, a large dense product."""
    big = bench.device.type == "cuda"
    source = torch.empty(1 << 32 if big else 1 << 16, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.write("limits", what="copy", bytes_per_second=2 * source.numel() / seconds)
    size = 8192 if big else 64
    a, b = bench.randn(size, size), bench.randn(size, size)
    bench.write("limits", what="dense product", flops=2 * size**3 / bench.seconds(lambda: a @ b))


def restoring(bench: Bench) -> None:
    """NF4 with nested statistics to 16 bits: bytes read and written per second."""
    s = bench.shapes
    weight = bench.packed(s.experts, 2 * s.inner, s.hidden)
    out = torch.empty(weight.shape, dtype=s.dtype, device=bench.device)
    moved = weight.nbytes + out.numel() * out.element_size()
    usual = nf4_gpu.SIZE, nf4_gpu.WARPS
    for size, warps in (usual, (2048, 4), (8192, 8), (1024, 2)):
        nf4_gpu.SIZE, nf4_gpu.WARPS = size, warps
        try:
            seconds = bench.seconds(lambda: nf4_gpu.dequantize(weight, out))
        finally:  # all that follows restores too
            nf4_gpu.SIZE, nf4_gpu.WARPS = usual
        bench.write("dequantize", size=size, warps=warps, seconds=seconds, bytes_per_second=moved / seconds)


def routes(bench: Bench) -> None:
    """Permutation, inverse and offsets, beside a stable sort."""
    for tokens in bench.shapes.tokens:
        index = bench.routing(tokens).flatten()
        for name, path in (("triton", routing), ("stable argsort", routing_reference)):
            seconds = bench.seconds(lambda p=path, i=index: p.bucket(i, bench.shapes.experts))
            bench.write("routing", path=name, tokens=tokens, seconds=seconds)


def _expert_block(bench: Bench, packed: bool) -> Callable[[], None]:
    """Routing and a layer's experts, forward and backward, with factors on both stacks."""
    s = bench.shapes
    up, down = bench.packed(s.experts, 2 * s.inner, s.hidden), bench.packed(s.experts, s.hidden, s.inner)
    stacks = (up, down) if packed else (dense(up, s.dtype), dense(down, s.dtype))
    factors = [
        gpu.Factors(bench.randn(s.experts * s.rank, columns), bench.randn(rows, s.rank * s.experts), 1.0)
        for rows, columns in ((2 * s.inner, s.hidden), (s.hidden, s.inner))
    ]
    tokens = s.tokens[-1]
    x, weights = bench.randn(tokens, s.hidden), bench.randn(tokens, s.top_k, dtype=torch.float32)
    index = bench.routing(tokens).flatten()

    def run() -> None:
        buckets = Buckets(*routing.bucket(index, s.experts))
        _, saved = gpu.forward(x, weights, *stacks, *factors, buckets, "gelu_tanh", True)
        gpu.backward(x, x, weights, *stacks, *factors, buckets, "gelu_tanh", saved)

    return run


def tuning(bench: Bench) -> None:
    """Choose the launches of a layer's products, forward and backward, and keep them for this GPU; count them."""
    for packed in (True, False):
        run = _expert_block(bench, packed)
        if bench.device.type != "cuda":  # nothing to time, nothing launched
            run()
            continue
        for key, seconds in kernel_tuning.tune(bench.device, run, 3).items():
            found = {str(tuple(candidate)): time for candidate, time in seconds.items()}
            bench.write("tuning", key=key, tokens=bench.shapes.tokens[-1], seconds=found)
        run()
        with torch_profiler.profile(activities=[torch_profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        launched = sum("CUDA" in str(event.device_type) for event in profiler.events())
        bench.write("launches", what="routing and experts of a layer", packed=packed, launches=launched)


def products(bench: Bench) -> None:
    """gate_up forward and backward by every path, TFLOP/s of rows that exist."""
    s = bench.shapes
    weight = bench.packed(s.experts, 2 * s.inner, s.hidden)
    resident = dense(weight, s.dtype)
    for tokens in s.tokens:
        if bench.is_late:
            return
        rows = tokens * s.top_k
        _, _, offsets = routing.bucket(bench.routing(tokens).flatten(), s.experts)
        flops = 2 * rows * 2 * s.inner * s.hidden
        paths = {"fused": weight, "workspace": weight, "grouped_mm": weight}
        chosen = config.path_of_weight(weight, rows, bench.randn(1, 1))
        default = config.rows_of_tile(rows, s.experts)
        for m in sorted({default, *((64, 128) if default == 128 else ())}):
            tiles = grouped.Tiles.of(offsets, rows, m)
            for transpose in (False, True):
                x = bench.randn(rows, 2 * s.inner if transpose else s.hidden)
                for path, stack in [*paths.items(), ("resident", resident), ("resident grouped_mm", resident)]:
                    if m != default and "grouped_mm" in path:
                        continue
                    how: Any = {"resident": "workspace", "resident grouped_mm": "grouped_mm"}.get(path, path)
                    record = {"path": path, "tokens": tokens, "transpose": transpose, "rows_of_tile": m}
                    try:
                        seconds = bench.seconds(
                            lambda x=x, w=stack, t=tiles, b=transpose, h=how: grouped.grouped_linear(
                                x, w, t, transpose=b, path=h
                            ),
                            5,
                        )
                    except Exception as error:  # one path may not run on this GPU; the others still tell
                        bench.write("products", **record, error=f"{type(error).__name__}: {error}"[:300])
                        continue
                    bench.write("products", **record, seconds=seconds, flops=flops / seconds, default=path == chosen)


def norms(bench: Bench) -> None:
    """Norms of the hidden states and of heads, forward and backward, in bytes of rows read and written per second.

    The fused operation takes a block of threads for each row, so that heads, which are short, tell whether it suffices.
    """
    s = bench.shapes
    tokens = s.tokens[-1]
    for what, shape in (
        ("hidden", (tokens, s.hidden)),
        ("heads of 256", (tokens, 16, 256)),
        ("heads of 512", (tokens, 16, 512)),
    ):
        weight, x, grad = bench.randn(shape[-1]), bench.randn(*shape).requires_grad_(), bench.randn(*shape)
        for path, function in (("fused", rms_norm_gpu.rms_norm), ("spelled out", rms_norm_reference.rms_norm)):
            out = function(x, weight, 1e-6, 0.0, False)
            forward = bench.seconds(lambda f=function, a=x, w=weight: f(a, w, 1e-6, 0.0, False))
            backward = bench.seconds(lambda o=out, g=grad, a=x: torch.autograd.grad(o, a, g, retain_graph=True))
            size = x.numel() * x.element_size()
            record = {"what": what, "path": path, "tokens": tokens, "seconds": forward, "backward_seconds": backward}
            rates = {"bytes_per_second": 2 * size / forward, "backward_bytes_per_second": 3 * size / backward}
            bench.write("norms", **record, **rates)


def thin(bench: Bench) -> None:
    """Low-rank products and the outer products of their gradients."""
    s = bench.shapes
    for tokens in s.tokens[-2:]:
        rows = tokens * s.top_k
        _, _, offsets = routing.bucket(bench.routing(tokens).flatten(), s.experts)
        tiles = grouped.Tiles.of(offsets, rows)
        a, x, g = bench.randn(s.experts, s.rank, s.hidden), bench.randn(rows, s.hidden), bench.randn(rows, s.rank)
        read = x.numel() * x.element_size()
        for name, run in (
            ("rows through A", partial(grouped.grouped_linear, x, a, tiles, path="workspace")),
            ("outer products", partial(grouped_outer, g, x, offsets)),
        ):
            seconds = bench.seconds(run)
            bench.write("thin", what=name, tokens=tokens, seconds=seconds, bytes_per_second=read / seconds)


def loss_head(bench: Bench) -> None:
    """Loss and gradient of the hidden states, of all rows."""
    s = bench.shapes
    head = bench.randn(s.vocabulary, s.hidden) * 0.02
    for tokens in s.tokens[-2:]:
        hidden = bench.randn(tokens, s.hidden).requires_grad_()
        labels = torch.randint(0, s.vocabulary, (tokens,), device=bench.device)

        def run(hidden=hidden, labels=labels) -> None:
            linear_cross_entropy(hidden, head, labels, 30.0).backward()
            hidden.grad = None

        seconds = bench.seconds(run, 3)
        flops = 4 * tokens * s.vocabulary * s.hidden
        bench.write("loss head", tokens=tokens, seconds=seconds, flops=flops / seconds)
