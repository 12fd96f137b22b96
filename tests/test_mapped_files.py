"""Pages of checkpoint files leave memory after they were read, and no value changes."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeft.integration import mapped_files
from moeft.integration.mapped_files import MappedFiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose /proc tells what is resident")


def resident_bytes(path) -> int:
    """Resident bytes of the mappings of a file, as the kernel counts them."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        blocks = file.read().split("VmFlags:")
    counts = [block.partition("Rss:")[2].split()[0] for block in blocks if str(path) in block]
    return 1024 * sum(map(int, counts))


@pytest.fixture
def mapped(tmp_path):
    """A file of 8 MiB, and its one tensor as a view of the mapping."""
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.arange(2**21, dtype=torch.float32)}, path)
    with safe_open(path, "pt") as file:
        tensor = file.get_slice("w")[:]
        assert tensor.sum() > 0
        assert resident_bytes(path) >= tensor.nbytes
        yield path, tensor


def test_released_pages_are_gone_and_come_back_as_they_were(mapped):
    path, tensor = mapped
    MappedFiles([path]).release()
    assert resident_bytes(path) == 0
    assert torch.equal(tensor, torch.arange(2**21, dtype=torch.float32))


def test_file_with_a_changed_page_keeps_its_pages(mapped):
    path, tensor = mapped
    tensor[5] = -1
    MappedFiles([path]).release()
    assert tensor[5] == -1


def test_pages_are_released_every_step_bytes(mapped):
    path, tensor = mapped
    files = MappedFiles([path])
    files.count_read(files.step_bytes - 1)
    assert resident_bytes(path) >= tensor.nbytes
    files.count_read(1)
    assert resident_bytes(path) == 0


def test_pages_stay_where_nothing_says_whether_they_changed(mapped, monkeypatch):
    path, tensor = mapped
    monkeypatch.setattr(mapped_files, "PAGEMAP", "/proc/self/no-pagemap")
    mapped_files.give_back([tensor])
    MappedFiles([path]).release()
    assert resident_bytes(path) >= tensor.nbytes
