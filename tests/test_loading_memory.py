"""Peak host memory of loading: one tensor and a step of reading, never a second copy of the model."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import moeft
from moeft.integration.mapped_files import MIN_STEP_BYTES
from tests.sparse_checkpoints import write_sparse
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose /proc tells the peak of a process")
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

    folder = Path(sys.argv[1])
    moeft.load(folder.parent / "small", moeft.NF4Config())  # so that imports and thread pools do not count
"""


def config(**sizes):
    found = tiny_config("gemma4")
    for name, value in sizes.items():
        setattr(found, name, value)
    return found


def large():
    """Experts of 0.6 billion parameters: 1.2 GB in bfloat16, 340 MB packed."""
    return config(num_experts=64, hidden_size=512, moe_intermediate_size=2048)


def peaks(folder, script):
    write_sparse(config(), folder.parent / "small")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


def test_packed_checkpoint_reaches_a_device_through_one_step_of_reading(tmp_path):
    folder = write_sparse(large(), tmp_path / "packed", moeft.NF4Config(double_quant=True))
    script = """
        def read(tensor, device):
            # A device whose memory is not the host's: every byte is read, and none of it stays.
            tensor.contiguous().view(-1).view(torch.uint8).max()
            return tensor.to(device)

        model, _ = peak_of(lambda: moeft.load(folder))
        peak_of(lambda: place(model, "meta", [folder / "model.safetensors"], read))
        model, _ = moeft.load(folder)
        peak_of(lambda: model._apply(lambda tensor: read(tensor, "meta")))
    """
    size = (folder / "model.safetensors").stat().st_size
    loaded, placed, moved = peaks(folder, script)
    assert size > 2.2 * MIN_STEP_BYTES
    assert loaded < 0.1 * size  # a mapping, of which nothing was read
    tensor = 64 * 512 * 2048  # codes of a gate_up stack
    assert placed < MIN_STEP_BYTES + tensor + (16 << 20)
    assert moved > 0.9 * size > placed  # what `model.to` leaves behind


def test_a_16_bit_checkpoint_is_packed_with_one_tensor_in_flight(tmp_path):
    folder = write_sparse(large(), tmp_path / "base")
    size = (folder / "model.safetensors").stat().st_size
    (peak,) = peaks(folder, "model, _ = peak_of(lambda: moeft.load(folder, moeft.NF4Config()))")
    packed = size * 0.5625 / 2
    tensor = 2 * 64 * 2 * 512 * 2048
    assert peak < packed + tensor + MIN_STEP_BYTES + (32 << 20) < size
