"""Count what a training step of the 26B text model keeps, peaks at and launches on a GPU, where there is none.

usage: python benches/gpu_meta.py [--sequences 4] [--length 4096] [--attention-only] [--stock-norms]
           [--capability 9.0] [--card-gib 141]

The step runs on the meta device, through the code that a GPU takes: tensors have shapes and no numbers, launches of
Triton are counted instead of made. The peak is that of tensors, as ``torch.cuda.max_memory_allocated`` gives it but for
what libraries allocate of themselves, such as cuBLAS's workspace. Attention counts as PyTorch's kernels that take
documents do, with the float32 sums and the gradients of shared heads that FlashAttention's backward makes in between.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import gpu_model
import gpu_training
from gpu_harness import Bench, Shapes
from gpu_training import inputs_of, prepare
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.document_attention import take_documents
from moeft.integration.fused_norms import FusedNorm
from moeft.kernels import dispatch
from moeft.kernels.document_attention import gpu as document_attention
from moeft.kernels.document_attention.reference import repeated
from moeft.kernels.experts import operator
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear.gpu import release_workspaces
from moeft.kernels.routing import gpu as routing

ROUNDING = 512  # bytes to which CUDA's allocator rounds
# Operations that launch nothing.
NOTHING = {f"aten::{name}" for name in (
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "split", "split_with_sizes",
    "squeeze", "unsqueeze", "unbind", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided",
)}  # fmt: skip
PERIOD = 6  # layers: five slide, one attends to everything


def main() -> None:
    """Print a line of JSON for each policy of checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--attention-only", action="store_true", help="no factors on the experts")
    parser.add_argument("--stock-norms", action="store_true", help="the norms of transformers")
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU")
    parser.add_argument("--card-gib", type=int, default=141, help="its memory, of which the workspace is a share")
    arguments = parser.parse_args()
    capability = tuple(int(part) for part in arguments.capability.split("."))
    with as_on_a_gpu(capability, arguments.card_gib << 30) as allocations:
        for policy in POLICIES:
            # What a layer takes is the difference between models of two lengths.
            short, long, whole = (
                step(allocations, layers, policy, arguments) for layers in (PERIOD, 2 * PERIOD, Shapes().layers)
            )
            record = {
                "policy": policy,
                "norms": "stock" if arguments.stock_norms else "fused",
                "torch": torch.__version__,
                "kept_bytes_per_layer": (long["kept_bytes"] - short["kept_bytes"]) // PERIOD,
                "launches_per_layer": round((long["launches"] - short["launches"]) / PERIOD, 1),
                "resident_bytes": whole["resident_bytes"],
                "peak_bytes": whole["peak_bytes"],
            }
            print(json.dumps(vars(arguments) | record), flush=True)


def step(allocations: Allocations, layers: int, policy: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Forward and backward of a model with so many layers."""
    release_workspaces()
    bench = Bench(Shapes(layers=layers), Path("/dev/null"), 0)
    bench.device = torch.device("meta")
    base = gpu_model.build(bench)
    model = prepare(bench, base, not arguments.attention_only)
    if arguments.stock_norms:
        for module in model.modules():
            if isinstance(module, FusedNorm):
                module.__class__ = type(module).__mro__[2]
    apply_checkpointing(base, policy)
    inputs = inputs_of(bench, arguments.sequences, arguments.length)
    tokens = inputs["input_ids"]
    resident = sum(tensor.untyped_storage().nbytes() for tensor in distinct(model))
    with allocations:
        allocations.start(resident)
        loss = model(**inputs, labels=tokens, num_items_in_batch=tokens.numel()).loss
        kept = allocations.live - resident
        loss.backward()
    return {
        "resident_bytes": resident,
        "kept_bytes": kept,
        "peak_bytes": allocations.peak,
        "launches": allocations.launches,
    }


def distinct(model: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that were made and are alive, the most there were, and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.launches = 0
        self._alive: set[int] = set()

    def start(self, resident_bytes: int) -> None:
        """Count from here on; so many bytes were there before."""
        self.live = self.peak = resident_bytes
        self.launches = 0
        self._alive.clear()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        before = {storage._cdata for storage in storages((arguments, keywords))}
        out = function(*arguments, **(keywords or {}))
        name = function._schema.name
        self.launches += name.startswith("aten::") and name not in NOTHING
        for storage in storages(out):
            if storage._cdata not in before and storage._cdata not in self._alive:
                size = -(-storage.nbytes() // ROUNDING) * ROUNDING
                self._alive.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, size)
        return out

    def _free(self, key: int, size: int) -> None:
        if key in self._alive:
            self._alive.remove(key)
            self.live -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Memory of the tensors on the meta device."""
    leaves = tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "meta"]


@contextmanager
def as_on_a_gpu(capability: tuple[int, ...], memory_bytes: int) -> Iterator[Allocations]:
    """Let tensors on the meta device take the way of a GPU with so much memory."""
    allocations = Allocations()

    def count(*_: Any, **__: Any) -> None:
        allocations.launches += 1

    def constant(value: Any) -> Any:
        return lambda *_, **__: value

    fused = torch.library.Library("aten", "IMPL")
    fused.impl("rms_norm", lambda x, shape, weight=None, eps=None: _Norm.apply(x, weight), "AutogradMeta")
    # Operators are opaque, and on the meta device stand-ins for them run: their code is to be seen.
    patches = [
        (dispatch, "_obstacle", constant(None)),
        (config, "capability_of", constant(capability)),
        (config, "workspace_bytes", constant(config.share_of(memory_bytes))),
        (operator, "experts_forward", operator.experts_forward._init_fn),
        (operator, "experts_backward", operator.experts_backward._init_fn),
        (routing, "bucket", routing.sort_rows),
        (JITFunction, "run", count),
        (gpu_model, "inject_routing", constant(None)),  # decisions have no numbers here
        (gpu_training, "attend_inside_documents", take_documents),  # nor has what a model is asked
        (document_attention, "_flash", lambda q, k, v, *_: _Attention.apply(q, k, v)),
        (document_attention, "_memory_efficient", wide_attention),
        (torch, "is_autocast_enabled", constant(False)),  # knows no meta device
        (torch, "autocast", lambda *_, **__: nullcontext()),
    ]
    with ExitStack() as stack:
        stack.callback(fused._destroy)
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield allocations


# What is one operation on CUDA, PyTorch composes of many on the meta device. These keep and make what is kept and made
# there; ``zeros`` stands for a launch, ``empty`` for memory alone.
class _Norm(torch.autograd.Function):
    """``torch.nn.functional.rms_norm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return x.new_zeros(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, _, _ = ctx.saved_tensors
        return x.new_zeros(x.shape), None


class _Attention(torch.autograd.Function):
    """Attention inside documents, ``[T, H, D]``; keys and values have G heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, heads, _ = q.shape
        out = q.new_zeros(tokens, heads, v.shape[2])
        ctx.save_for_backward(q, k, v, out, q.new_empty(heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, logsumexp = ctx.saved_tensors
        _ = torch.zeros_like(logsumexp)  # products of outputs and their gradients
        sums = torch.zeros_like(q, dtype=torch.float32)
        gradients = k.new_zeros(*q.shape[:2], k.shape[2]), v.new_empty(*q.shape[:2], v.shape[2])
        d_q = sums.to(q.dtype)
        if k.shape == q.shape:
            return d_q, *gradients
        shared = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in gradients)
        return d_q, *shared


def wide_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """The memory-efficient one, whose heads are not shared."""
    return _Attention.apply(q, repeated(k, q.shape[1]), repeated(v, q.shape[1]))


if __name__ == "__main__":
    main()
