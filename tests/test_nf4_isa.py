"""Every instruction set of this CPU gives the same bytes, and the variable that forces one is checked."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from moeft.kernels.nf4 import reference
from moeft.kernels.nf4.weight import Layout

# No torch in the child: it would take seconds to import.
PACK_AND_RESTORE = """
import sys
import numpy as np
from moeft import _core

case = np.load(sys.argv[1])
sizes = [int(size) for size in case["sizes"]]
packed, absmax = np.empty_like(case["packed"]), np.empty_like(case["absmax"])
_core.nf4_quantize(case["values"], "bfloat16", *sizes, "nf4", packed, absmax, 1)
np.testing.assert_array_equal(packed, case["packed"])
np.testing.assert_array_equal(absmax, case["absmax"])
restored = np.empty_like(case["restored"])
_core.nf4_dequantize(packed, absmax, None, 0.0, *sizes, "nf4", restored, "bfloat16", 1)
np.testing.assert_array_equal(restored, case["restored"])
"""


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PACK_AND_RESTORE, *arguments]
    environment = {**os.environ, "MOEFT_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A stack with odd experts, as the definition packs it and restores it."""
    layout = Layout(3, 1001, 64)
    values = torch.randn(3003, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[::97] = 0.0
    packed, absmax = reference.quantize(values, layout, "nf4")
    restored = reference.dequantize(packed, absmax, layout, torch.bfloat16)
    path = tmp_path_factory.mktemp("isa") / "case.npz"
    np.savez(
        path,
        sizes=[layout.groups, layout.group_len, layout.block_size],
        values=values.view(torch.uint16).numpy(),
        packed=packed.flatten().numpy(),
        absmax=absmax.flatten().numpy(),
        restored=restored.flatten().view(torch.uint16).numpy(),
    )
    return str(path)


@pytest.fixture(scope="module")
def available(case):
    """The sets that this CPU has, as the error about an unknown one lists them."""
    error = run("sse9", case).stderr
    listed = re.search(r'ValueError: MOEFT_ISA is "sse9", expected one that this CPU has: (.*)', error)
    assert listed, error
    return listed[1].split(", ")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_an_instruction_set_packs_and_restores_as_the_definition_or_is_refused(case, available, isa):
    done = run(isa, case)
    if isa in available:
        assert done.returncode == 0, done.stderr
    else:
        assert f'ValueError: MOEFT_ISA is "{isa}", expected one that this CPU has: scalar' in done.stderr
