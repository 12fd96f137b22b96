"""Time attention of a sliding and of a full layer on packed rows, inside documents and with a mask over all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from gpu_harness import Bench
from moeft.integration.document_masks import as_added
from moeft.kernels.document_attention import Documents, attend_documents
from moeft.kernels.document_attention.reference import repeated
from pack_mask import visible

FORWARD_AND_BACKWARD = 3.5
"""Operations by those of a forward: two products of all pairs there, five in backward."""


class Layer(NamedTuple):
    """Attention of one kind of layer."""

    name: str
    heads: int
    groups: int
    width: int
    window: int | None


def layers(bench: Bench) -> list[Layer]:
    """The two kinds of the 26B model."""
    if bench.shapes.hidden > 1000:
        return [Layer("sliding", 16, 8, 256, 1024), Layer("full", 16, 2, 512, None)]
    return [Layer("sliding", 4, 2, 16, 16), Layer("full", 4, 1, 32, None)]


def packs(bench: Bench) -> dict[str, list[int]]:
    """Lengths of the documents of a row: one, and several as packs of chats have them."""
    length = bench.shapes.sequences[-1]
    parts = [length * share // 64 for share in (24, 14, 9, 6, 4, 3, 2)]
    return {"one document": [length], "several documents": [*parts, length - sum(parts)]}


def run(bench: Bench) -> None:
    """Forward alone, and with backward, in milliseconds and operations of the pairs that are needed per second."""
    rows = bench.shapes.packed_sequences
    for layer in layers(bench):
        for name, lengths in packs(bench).items():
            ours, by_mask, leaves = paths(bench, layer, lengths * rows, rows)
            pairs = rows * sum(needed_pairs(length, layer.window) for length in lengths)
            operations = 4 * pairs * layer.heads * layer.width
            for path, attend in (("documents", ours), ("mask", by_mask)):
                seconds = bench.seconds(lambda f=attend, x=leaves: f(*x), 5)
                both = bench.seconds(lambda f=attend, x=leaves: f(*x).backward(x[0].detach()), 5)
                for leaf in leaves:
                    leaf.grad = None
                bench.write(
                    "attention",
                    layer=layer.name,
                    rows=name,
                    path=path,
                    milliseconds=1e3 * seconds,
                    milliseconds_with_backward=1e3 * both,
                    flops=operations / seconds,
                    flops_with_backward=FORWARD_AND_BACKWARD * operations / both,
                )


def paths(
    bench: Bench, layer: Layer, lengths: Sequence[int], rows: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Both ways through a layer's attention, ``[T, H, D]`` each, and queries, keys and values for them."""
    tokens = sum(lengths)
    heads = (layer.heads, layer.groups, layer.groups)
    leaves = [bench.randn(tokens, number, layer.width).requires_grad_() for number in heads]
    documents = Documents(lengths)
    mask = as_added(visible(lengths, rows, layer.window, bench.device), bench.shapes.dtype)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_documents(q, k, v, documents, window=layer.window)

    def masked(*given: Tensor) -> Tensor:
        q, k, v = (repeated(x, layer.heads).unflatten(0, (rows, -1)).transpose(1, 2) for x in given)
        return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype)).transpose(1, 2).flatten(0, 1)

    return inside, masked, leaves


def needed_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in one document."""
    width = min(length, window or length)
    return width * (width + 1) // 2 + (length - width) * width
