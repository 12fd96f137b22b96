"""Where the processor is, sampled by ``perf`` from outside: by function, so that no watching slows what is watched.

Needs ``perf`` and, to tell products of the Rust core from the rest of it, a core with symbols, which maturin strips:
``CARGO_PROFILE_RELEASE_STRIP=none cargo build --release -p moeft-py`` and a copy of the library in place of the other.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

HERTZ = 2000
# First match wins. Library and function, as perf names them.
CATEGORIES = (
    ("matmul", r"mkl_blas|mkl_.*gemm|moeft_core::gemm|\bgemm\b"),
    ("attention kernel outside of its products", r"flash_attention"),
    ("core: norms", r"rms_norm"),
    ("core: 4-bit weights restored", r"moeft_core::nf4"),
    ("core: rest", r"_core\.abi3"),
    ("optimiser", r"fused_adam"),
    ("elementwise and reductions", r"at::native|Sleef|mkl_vml|vectorized|at::vec|serial_for_each"),
    ("Python", r"libpython|python3|\[\.\] _?Py"),
    ("bindings, dispatch, autograd", r"libtorch|libc10|libshm|libstdc"),
    ("memory: allocation, copies, page faults", r"libc\.so|ld-linux|\[kernel"),
)


class Samples:
    """Shares of the CPU time of some steps by category."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.shares: dict[str, float] = {}
        self.core_has_symbols = False

    @staticmethod
    def is_available() -> bool:
        """Whether perf may sample this process."""
        if shutil.which("perf") is None:
            return False
        probe = ["perf", "record", "-e", "cpu-clock", "-o", os.devnull, "true"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0

    def begin(self) -> None:
        self._scratch = TemporaryDirectory()
        self._data = Path(self._scratch.name) / "perf.data"
        self._perf = subprocess.Popen(
            ["perf", "record", "-e", "cpu-clock", "-F", str(HERTZ), "-o", str(self._data), "-p", str(os.getpid())],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(1)  # perf attaches; this thread sleeps and gives no sample

    def end(self) -> None:
        self._perf.send_signal(signal.SIGINT)
        self._perf.wait()
        report = ["perf", "report", "-i", str(self._data), "--stdio", "-g", "none", "-F", "overhead,dso,symbol"]
        lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout.splitlines()
        self._scratch.cleanup()
        self.core_has_symbols = any("moeft_core::" in line for line in lines)
        self.shares = classify(lines)


def classify(lines: list[str]) -> dict[str, float]:
    """Share of each category from the lines of a report, ``12.3%  library  [.] function``."""
    shares = {name: 0.0 for name, _ in CATEGORIES} | {"other": 0.0}
    for line in lines:
        percent, _, place = line.strip().partition("%")
        if not re.fullmatch(r"[0-9.]+", percent):
            continue
        name = next((name for name, pattern in CATEGORIES if re.search(pattern, place)), "other")
        shares[name] += float(percent) / 100
    return shares
