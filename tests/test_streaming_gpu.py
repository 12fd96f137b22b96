"""Streaming on a GPU: registered memory, copies on a side stream, the same bits, and no wait on the host."""

from __future__ import annotations

import gc

import pytest
import torch

import moeft
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.streaming import stream_experts
from moeft.modules.streaming import HostMemory, Ring, Source, cuda
from tests.test_streaming import assert_same, gradients
from tests.test_streaming_ring import walk
from tests.tiny_models import randomise_lora, token_ids
from tests.tiny_training import load, packed_with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = token_ids(2, 24)
BYTES = 32 << 20


def ring_on_gpu(layers, pinned, slots=2):
    memory = HostMemory(layers * BYTES, *((cuda.register, cuda.unregister) if pinned else ()), chunk_bytes=5 << 20)
    assert memory.is_pinned is pinned
    for layer in range(layers):
        memory.bytes[layer * BYTES : (layer + 1) * BYTES] = layer + 1
    sources = [Source(memory.pieces(layer * BYTES, [(0, BYTES)])) for layer in range(layers)]
    return Ring(sources, cuda.CudaCopier(torch.device("cuda", 0), memory), slots)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("slots", [2, 3])
def test_a_slot_is_not_overwritten_while_slow_kernels_read_it(pinned, slots):
    ring = ring_on_gpu(6, pinned, slots)
    order = walk(6) * 3 + [0, 5, 2, 4, 1]
    found = []
    for layer in order:
        with ring.borrow(layer) as memory:
            torch.cuda._sleep(3_000_000)  # the copy of the next layer would be done long before
            found.append((memory.min(), memory.max()))
    for layer, (least, most) in zip(order, found, strict=True):
        assert int(least) == int(most) == layer + 1
    ring.close()


def test_registered_memory_is_read_without_a_wait_on_the_host():
    ring = ring_on_gpu(4, pinned=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in walk(4):
            with ring.borrow(layer) as memory:
                memory.sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ring.close()


def test_memory_can_be_registered_again_after_a_stream_is_closed():
    memory = HostMemory(3 << 20, cuda.register, cuda.unregister, chunk_bytes=1 << 20)
    assert memory.is_pinned
    assert memory.bytes.is_pinned()
    assert cuda.register(memory.bytes.data_ptr(), 1 << 20) is not None  # taken already
    torch.ones(1, device="cuda").add_(1)  # and the failure does not come up again
    memory.close()
    assert cuda.register(memory.bytes.data_ptr(), 1 << 20) is None
    cuda.unregister(memory.bytes.data_ptr())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backing", ["host", "disk"])
@pytest.mark.parametrize("resident", [0, 1])
def test_streamed_model_has_the_gradients_of_a_resident_one(checkpoints, tmp_path, policy, backing, resident):
    moeft.checkpoint.quantize(checkpoints["gemma4"], tmp_path / "packed")

    def model():
        found = moeft.add_lora(load(tmp_path / "packed"), 4, targets=("attention", "experts"), seed=0)
        randomise_lora(found)
        apply_checkpointing(found, policy)
        return found.train()

    whole = model().cuda()
    expected = gradients(whole, IDS.cuda())
    streamed = model()
    stream = stream_experts(streamed, "cuda", resident, backing)
    streamed.cuda()
    for _ in range(2):
        assert_same(gradients(streamed, IDS.cuda()), expected)
    stream.close()


def test_tokens_in_host_memory_are_refused(checkpoints):
    model = packed_with_lora(checkpoints["olmoe"])
    stream = stream_experts(model, "cuda")
    with pytest.raises(ValueError, match="the stream of experts is on cuda:0, but x on cpu"):
        gradients(model)
    stream.close()


def test_closed_stream_frees_its_slots(checkpoints):
    model = packed_with_lora(checkpoints["olmoe"])
    gc.collect()  # what other tests left
    before = torch.cuda.memory_allocated()
    stream = stream_experts(model, "cuda")
    assert torch.cuda.memory_allocated() - before >= stream.ring.num_bytes > 0
    stream.close()
    assert torch.cuda.memory_allocated() == before
