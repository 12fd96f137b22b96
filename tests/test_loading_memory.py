"""Peak host memory of loading: one tensor and a step of reading, never a second copy of the model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

import moeft
from moeft.integration.mapped_files import MIN_STEP_BYTES
from tests.sparse_checkpoints import write_sparse
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose /proc tells the peak of a process")
CODES_BYTES = 64 * 512 * 2048  # of the largest stack, a fourth of it in bfloat16
PRELUDE = """
    import sys, gc, torch, moeft
    from pathlib import Path
    from moeft.integration.placing import place

    def resident(field):
        return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(field))

    def peak_of(run):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        kept = run()
        print(resident("VmHWM") - before)
        return kept

    root = Path(sys.argv[1])
    moeft.load(root / "small", moeft.NF4Config())  # so that imports and thread pools do not count
"""


def config(**sizes):
    found = tiny_config("gemma4")
    for name, value in sizes.items():
        setattr(found, name, value)
    return found


def large():
    """Experts of 0.6 billion parameters: 1.2 GB in bfloat16, 340 MB packed."""
    return config(num_experts=64, hidden_size=512, moe_intermediate_size=2048)


SCRIPT = """
    def read(tensor, device):
        # A device whose memory is not the host's: every byte is read, and none of it stays.
        tensor.contiguous().view(-1).view(torch.uint8).max()
        return tensor.to(device)

    packed = root / "packed"
    model, _ = peak_of(lambda: moeft.load(packed))
    peak_of(lambda: place(model, "meta", [packed / "model.safetensors"], read))
    model, _ = moeft.load(packed)
    peak_of(lambda: model._apply(lambda tensor: read(tensor, "meta")))
    model, _ = peak_of(lambda: moeft.load(root / "base", moeft.NF4Config()))
"""


class Peaks(NamedTuple):
    """Bytes of resident memory beyond what a process had before."""

    loaded: int
    placed: int
    moved: int
    quantised: int
    packed_file: int
    base_file: int


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    write_sparse(config(), root / "small")
    files = [
        write_sparse(large(), root / "packed", moeft.NF4Config(double_quant=True)),
        write_sparse(large(), root / "base"),
    ]
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(SCRIPT)
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in files]
    return Peaks(*(int(line) for line in done.stdout.split()), *sizes)


def test_packed_checkpoint_reaches_a_device_through_one_step_of_reading(peaks):
    size = peaks.packed_file
    assert size > 2.2 * MIN_STEP_BYTES
    assert peaks.loaded < 0.1 * size  # a mapping, of which nothing was read
    assert peaks.placed < MIN_STEP_BYTES + CODES_BYTES + (16 << 20)
    assert peaks.moved > 0.9 * size > peaks.placed  # what `model.to` leaves behind


def test_a_16_bit_checkpoint_is_packed_with_one_tensor_in_flight(peaks):
    packed = peaks.base_file * 0.5625 / 2
    assert peaks.quantised < packed + 4 * CODES_BYTES + MIN_STEP_BYTES + (32 << 20) < peaks.base_file
