"""Proof that training left the base alone: a hash of everything frozen, at the start and at the end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moeft.errors import TrainingError
from moeft.integration.mapped_files import give_back
from moeft.integration.streaming import streamed_tensors
from moeft.training.processes import any_process, local, reshard

if TYPE_CHECKING:
    from moeft.training.progress import EventSink

CHUNK_BYTES = 64 << 20
SHOWN = 5


class FrozenBase(TrainerCallback):
    """Hashes frozen parameters and persistent buffers when training begins, and compares when it ends.

    Every process of a sharded run hashes the shards that it holds, and all fail if one of them changed.

    Attributes:
        seconds: What hashing has cost so far.
        num_bytes: Bytes under the hash, of this process.
        sha256: Hash of what this process holds of the base, which is all of it unless sharded; None before training.

    Args:
        events: Where to record hash and cost.
    """

    def __init__(self, events: EventSink | None = None) -> None:
        self.events = events
        self.seconds = 0.0
        self.num_bytes = 0
        self.sha256: str | None = None
        self._before: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hash."""
        self._before = self._hash(kwargs["model"])
        self.sha256 = hashlib.sha256("".join(f"{n}{h}" for n, h in sorted(self._before.items())).encode()).hexdigest()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it again.

        Raises:
            TrainingError: Naming the tensors that changed.
        """
        after = self._hash(kwargs["model"])
        changed = sorted(
            name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name)
        )
        if self.events is not None and state.is_world_process_zero:
            self.events.event(
                "frozen_base", sha256=self.sha256, bytes=self.num_bytes, seconds=self.seconds, changed=changed
            )
        if any_process(bool(changed), args.device):
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            what = f"{len(changed)} frozen tensors: {', '.join(changed[:SHOWN])}{more}"
            raise TrainingError(
                f"training changed {what if changed else 'frozen tensors in another process'}; the adapter belongs to "
                "another base than it will be loaded on. Look for code that writes to weights in place, such as a "
                "callback or a hook"
            )

    def _hash(self, model: nn.Module) -> dict[str, str]:
        start = time.perf_counter()
        reshard(model)
        frozen = dict(frozen_tensors(model))
        waiting = {tensor.data_ptr() for tensor in streamed_tensors(model)}

        def hashed(tensor: Tensor) -> str:
            found = hash_tensor(tensor)
            if tensor.data_ptr() in waiting:  # in a file, perhaps because the host has no memory for all of it
                give_back([tensor])
            return found

        # hashlib lets go of the interpreter's lock, so threads hash side by side.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            hashes = dict(zip(frozen, pool.map(hashed, frozen.values()), strict=True))
        self.num_bytes = sum(tensor.nbytes for tensor in frozen.values())
        self.seconds += time.perf_counter() - start
        return hashes


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are not trained, packed ones included, and persistent buffers.

    Other buffers, such as rotary frequencies, are derived from the config, and some models change them.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield prefix + name, local(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield prefix + name, local(buffer)


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes; a tensor on a GPU is copied to the host 64 MiB at a time."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for chunk in tensor.contiguous().flatten().view(torch.uint8).split(CHUNK_BYTES):
        digest.update(chunk.cpu().numpy())
    return digest.hexdigest()
