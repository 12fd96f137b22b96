"""The ring of slots: right bytes under any order of use, never overwritten while lent, whole again after faults."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.modules.streaming import HostMemory, Ring, Source
from moeft.modules.streaming.copier import HostCopier
from moeft.modules.streaming.order import upcoming

LAYER_BYTES = 96


def layer_bytes(layer, num_bytes=LAYER_BYTES):
    return torch.full((num_bytes,), layer + 1, dtype=torch.uint8)


def ring_of(layers, slots=2, copier=None):
    sources = [Source([(0, layer_bytes(i)[:40]), (64, layer_bytes(i)[:32])]) for i in range(layers)]
    return Ring(sources, copier or HostCopier(), slots)


def holds(memory, layer):
    return bool((memory[:40] == layer + 1).all() and (memory[64:96] == layer + 1).all())


def walk(layers):
    """The layers that a pass uses: upwards, then downwards with each layer's forward run again."""
    return [*range(layers), *(layer for layer in reversed(range(layers)) for _ in range(2))]


@settings(max_examples=150)
@given(st.data())
def test_lent_slots_keep_their_layer_whatever_is_borrowed_beside_them(data):
    layers, slots = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 4))
    ring, lent = ring_of(layers, slots), []
    for _ in range(data.draw(st.integers(1, 40))):
        if lent and data.draw(st.booleans()):
            _, _, stack = lent.pop(data.draw(st.integers(0, len(lent) - 1)))
            stack.close()
        else:
            layer = data.draw(st.integers(0, layers - 1))
            stack, others = ExitStack(), {other for other, _, _ in lent}
            if len(others) == min(slots, layers) and layer not in others:
                with pytest.raises(RuntimeError, match=f"streamed layer {layer} is wanted while all"):
                    stack.enter_context(ring.borrow(layer))
                continue
            lent.append((layer, stack.enter_context(ring.borrow(layer)), stack))
        for layer, memory, _ in lent:
            assert holds(memory, layer)
    for _, _, stack in lent:
        stack.close()
    ring.close()


class SlowCopier(HostCopier):
    """Fills no slot until it is told to."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def start(self, pieces, slot, after, done):
        return self._thread.submit(lambda: self.gate.wait(10) and self._copy(pieces, slot.numpy(), done))


def test_a_layer_is_waited_for_and_the_next_one_is_not():
    copier = SlowCopier()
    ring = ring_of(4, copier=copier)
    found = []

    def use():
        with ring.borrow(0) as memory:
            found.append(holds(memory, 0))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert ring.traffic.copied == 2  # the second is on its way beside the first
    copier.gate.set()
    thread.join(10)
    assert found == [True]


@pytest.mark.parametrize("slots", [2, 3])
def test_training_asks_for_every_layer_in_time_in_both_directions(slots):
    ring = ring_of(6, slots)
    for layer in walk(6) * 3:
        with ring.borrow(layer) as memory:
            assert holds(memory, layer)
    assert ring.traffic.late == 1  # the first of all
    # Layers that are still there at a turn are not copied again: forward and backward each leave out one ring.
    assert ring.traffic.copied == 6 + (6 - slots) * 5


def test_evaluation_is_late_with_the_first_layer_of_a_pass_only():
    ring = ring_of(6)
    for layer in [*range(6)] * 3:
        with ring.borrow(layer):
            pass
    assert ring.traffic.late == 3


@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_guesses_are_other_layers_each_once(count, depth, data):
    current = data.draw(st.integers(0, count - 1))
    previous = data.draw(st.none() | st.integers(0, count - 1).filter(lambda layer: layer != current))
    found = upcoming(current, previous, count, depth)
    assert len(set(found)) == len(found) <= depth
    assert set(found) <= set(range(count)) - {current}


class FailingCopier(HostCopier):
    """Cannot read some layers for now."""

    def __init__(self):
        super().__init__()
        self.bad = set()

    @staticmethod
    def _fail():
        raise OSError("cannot read")

    def start(self, pieces, slot, after, done):
        if int(pieces[0][1][0]) - 1 in self.bad:
            return self._thread.submit(self._fail)
        return super().start(pieces, slot, after, done)


def test_a_failed_copy_is_raised_where_its_layer_is_used_and_made_again():
    copier = FailingCopier()
    ring = ring_of(4, copier=copier)
    copier.bad = {1}
    with ring.borrow(0):
        pass
    for _ in range(3):
        with pytest.raises(OSError, match="cannot read"), ring.borrow(1):
            pass
    copier.bad = set()
    for layer in walk(4):
        with ring.borrow(layer) as memory:
            assert holds(memory, layer)


def test_an_exception_inside_gives_the_slot_back():
    ring = ring_of(5)
    for layer in [0, 1, 2, 3, 1, 4]:
        with pytest.raises(KeyError), ring.borrow(layer):
            raise KeyError(layer)
    with ring.borrow(3) as first, ring.borrow(0) as second:
        assert holds(first, 3)
        assert holds(second, 0)


def test_a_closed_ring_says_so():
    ring = ring_of(3)
    ring.close()
    with pytest.raises(RuntimeError, match="stream is closed"), ring.borrow(0):
        pass


def test_a_ring_needs_layers_and_two_slots():
    with pytest.raises(ValueError, match="0 layers for 2 slots"):
        Ring([], HostCopier())
    with pytest.raises(ValueError, match="3 layers for 1 slots, expected a layer and at least 2"):
        ring_of(3, slots=1)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 100), st.integers(0, 50))
def test_runs_cover_every_tensor_and_never_cross_a_chunk(sizes, chunk_bytes, start):
    places = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    memory = HostMemory(start + sum(sizes) + 1, chunk_bytes=chunk_bytes)
    pieces = memory.pieces(start, places)
    assert sorted(byte for offset, run in pieces for byte in range(offset, offset + run.numel())) == [
        *range(sum(sizes))
    ]
    for offset, run in pieces:
        first = run.data_ptr() - memory.bytes.data_ptr()
        assert first == start + offset
        assert first // chunk_bytes == (first + run.numel() - 1) // chunk_bytes


def test_memory_is_registered_in_chunks_on_pages_or_not_at_all():
    registered = []

    def take(address, num_bytes):
        registered.append((address, num_bytes))

    memory = HostMemory(20_000, take, lambda address: None, chunk_bytes=8192)
    assert [num_bytes for _, num_bytes in registered] == [8192, 8192, 3616]
    assert all(address % 4096 == 0 for address, _ in registered)
    assert memory.is_pinned

    undone = []
    refused = HostMemory(20_000, lambda a, n: "out of memory" if n < 8192 else None, undone.append, chunk_bytes=8192)
    assert refused.obstacle == "out of memory"
    assert not refused.is_pinned
    assert len(undone) == 2
    refused.bytes.fill_(7)  # it serves all the same, unpinned
