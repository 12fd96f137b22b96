"""Measure the GPU path: every kernel's correctness first, then speed, memory and whole training steps. Under 8 minutes.

usage: python benches/gpu.py [--out FILE.jsonl] [--minutes 8] [--only SECTION ...] [--tiny]

Without a GPU, ``TRITON_INTERPRET=1 MOEFT_KERNELS=triton python benches/gpu.py --tiny`` runs every line at sizes that
mean nothing, so that a GPU's time is not spent on a slip of the pen.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpu_harness import Bench

# Most telling first: what comes last falls to the limit of time.
SECTIONS = (
    "limits",
    "restoring",
    "products",
    "tuning",
    "attention",
    "model",
    "guard",
    "streaming",
    "loss_head",
    "norms",
    "thin",
    "routes",
)


def main() -> int:
    """Run the sections; 1 if a kernel is wrong or a section failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file of JSON lines, by default named after the GPU and the day")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a machine without a GPU")
    parser.add_argument("--unchecked", action="store_true", help="without correctness, as in a second process")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("there is no CUDA device; --tiny runs through the bench without one")

    import gpu_correctness
    import gpu_harness

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no-gpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    out = arguments.out or Path(__file__).parent / "results" / f"{slug}-{datetime.date.today()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    shapes = gpu_harness.TINY if arguments.tiny else gpu_harness.Shapes()
    bench = gpu_harness.Bench(shapes, out, 60 * arguments.minutes - 30)
    bench.write("machine", **machine(name))
    torch.manual_seed(0)
    if not arguments.unchecked:
        green = False
        with bench.section("correctness"):
            green = gpu_correctness.run(bench)
        if not green:
            bench.write("stopped", reason="a kernel is wrong; nothing is timed")
            return 1
    for number, section in enumerate(arguments.only):
        if bench.is_late:
            bench.write("stopped", reason=f"no time left for {section}")
            break
        with bench.section(section):
            run_section(section, bench)
        if bench.is_lost:
            bench.write("failed", sections=bench.failed)
            continue_in_another_process(arguments.only[number + 1 :], out, bench, arguments.tiny)
    if bench.failed:
        bench.write("failed", sections=bench.failed)
    return 1 if bench.failed else 0


def run_section(section: str, bench: Bench) -> None:
    """Measure one section; modules that need more packages than the kernels do are loaded here, so that others run."""
    if section == "model":
        import gpu_steps

        gpu_steps.run(bench)
    elif section == "guard":
        import gpu_guard

        gpu_guard.run(bench)
    elif section == "attention":
        import gpu_attention

        gpu_attention.run(bench)
    elif section == "streaming":
        import gpu_streaming

        gpu_streaming.run(bench)
    else:
        import gpu_kernels

        getattr(gpu_kernels, section)(bench)


def continue_in_another_process(sections: Sequence[str], out: Path, bench: Bench, tiny: bool) -> None:
    """Replace this process, which lost its device, by one that measures the sections that are left."""
    if not sections:
        return
    options = ["--out", str(out), "--minutes", str(bench.seconds_left / 60 + 0.5), "--unchecked"]
    options += ["--tiny"] if tiny else []
    os.execv(sys.executable, [sys.executable, __file__, *options, "--only", *sections])


def machine(name: str) -> dict[str, object]:
    """What the numbers were measured on."""
    import transformers
    import triton

    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
    memory = torch.cuda.get_device_properties(0).total_memory if capability else 0
    return {
        "gpu": name,
        "capability": capability,
        "memory_bytes": memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
