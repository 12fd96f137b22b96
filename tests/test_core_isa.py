"""All kernels under each instruction set of this CPU, forced in turn."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SAVE_RESULTS = "import sys, core_kernels, numpy; numpy.savez(sys.argv[1], *core_kernels.run_all(2))"
# Packed bytes, scales and three restored types; routing; then the expert block; then AdamW.
EXPERT_BLOCK = slice(8, 15)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every kernel computes, by the instruction set; None where the CPU lacks it."""
    found = {}
    for isa in ("scalar", "avx2", "avx512"):
        path = tmp_path_factory.mktemp(isa) / "results.npz"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SAVE_RESULTS, str(path)],
            env={**os.environ, "MOEFT_ISA": isa},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        found[isa] = None
        if done.returncode == 0:
            with np.load(path) as arrays:
                found[isa] = [arrays[name] for name in arrays.files]
        else:
            assert f'MOEFT_ISA is "{isa}", expected one that this CPU has' in done.stderr
    return found


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernels_of_an_instruction_set_agree_with_the_scalar_ones(results, isa):
    found, scalar = results[isa], results["scalar"]
    if found is None:
        pytest.skip(f"needs a CPU with {isa}")
    block = range(len(scalar))[EXPERT_BLOCK]
    for i, (ours, theirs) in enumerate(zip(found, scalar, strict=True)):
        if i in block:  # float32 sums of up to 64 terms, in another order
            error = np.linalg.norm((ours - theirs).astype(float)) / np.linalg.norm(theirs.astype(float))
            assert error <= 1e-5, i
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=str(i))
