"""Compiling the launches that the host code makes, for GPUs that are not there.

The host code runs on the meta device, where nothing is computed; what it would launch is recorded and compiled for a
target with the tools inside Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class LaunchRecord(NamedTuple):
    """A kernel with the types and constants of one launch."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        sizes = dict(self.constants)
        shown = {k: sizes[k] for k in ("ROWS", "COLUMNS", "INNER", "TRANSPOSE", "F", "M", "N", "K") if k in sizes}
        kinds = [name for name, kind in self.signature if name == "absmax" and kind != "constexpr"]
        label = ",".join(f"{k}={int(v)}" for k, v in shown.items())
        return f"{self.kernel.fn.__name__}{'-packed' if kinds else ''}[{label}]"


class Compiled(NamedTuple):
    """What a GPU would run."""

    shared_bytes: int
    stack_bytes: int
    registers: int
    has_mma: bool
    loop_instructions: int  # of the longest loop, for one warp
    ptx: str


@contextmanager
def counted(names: list[str]) -> Iterator[None]:
    """Collect the names of launches instead of making them."""
    with _replaced(lambda kernel, *_: names.append(kernel.fn.__name__)):
        yield


def launches(call: Callable[[], object]) -> list[LaunchRecord]:
    """What a function would launch, each kind once."""
    records: list[LaunchRecord] = []

    def collect(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = _record(kernel, args, kwargs)
        if found not in records:
            records.append(found)

    with _replaced(collect):
        call()
    return records


@contextmanager
def _replaced(instead: Callable[..., None]) -> Iterator[None]:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        instead(self, args, kwargs)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def _record(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LaunchRecord:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, divisible = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            divisible.append(position)
        elif not parameter.is_constexpr and isinstance(value, float):
            kind = "fp32"
        elif not parameter.is_constexpr and isinstance(value, int) and (value != 1 or parameter.do_not_specialize):
            kind = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(position)
        if kind == "constexpr":
            constants[parameter.name] = value
        signature[parameter.name] = kind
    options = {k: kwargs[k] for k in OPTIONS if k in kwargs}
    return LaunchRecord(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items())
    )


def compile_for(record: LaunchRecord, capability: int) -> Compiled:
    """Compile a launch down to machine code."""
    attributes = {(position,): [["tt.divisibility", 16]] for position in record.divisible}
    source = ASTSource(record.kernel, dict(record.signature), dict(record.constants), attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(record.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("cuobjdump", "-sass", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    ptx = kernel.asm["ptx"]
    return Compiled(
        kernel.metadata.shared,
        int(found[2]),
        int(found[1]),
        "mma.sync" in ptx or "wgmma.mma_async" in ptx or "tcgen05.mma" in ptx,
        _longest_loop(code),
        ptx,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _longest_loop(code: str) -> int:
    """Instructions of the longest body that a branch jumps back over."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", code)
    addresses = [int(address, 16) for address, _, _ in instructions]
    longest = 0
    for address, operation, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if operation.startswith("BRA") and target and (start := int(target[1], 16)) < int(address, 16):
            longest = max(longest, sum(start <= a <= int(address, 16) for a in addresses))
    return longest
