"""From one layout to another: elements are moved, never computed, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.adapters.base import Base
from moeft.adapters.describe import describe_experts, describe_stacks, mark
from moeft.adapters.detect import detect, num_experts
from moeft.adapters.folder import CONFIG, PREFIX, WEIGHTS, AdapterFolder
from moeft.adapters.layout import HEADER_KEY, Layout, join, split
from moeft.adapters.per_expert import BLOCKS_KEY, Stack, restack, unstack
from moeft.adapters.writer import Output, write
from moeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    source: str | Path,
    out: str | Path,
    to: Layout | str,
    *,
    source_layout: Layout | str | None = None,
    base: str | Path | None = None,
) -> Layout:
    """Write an adapter in another layout.

    Args:
        source: The adapter folder.
        out: Folder to make; must not exist or be empty. Other files of ``source`` are copied.
        to: Layout to write.
        source_layout: Layout of ``source``, where the data leaves more than one.
        base: 16-bit base checkpoint; needed for single experts, else the one that the adapter names, if it is there.

    Returns:
        The layout that ``source`` was in.

    Raises:
        AdapterError: If the layout of ``source`` cannot be told, the adapter does not fit the base, ``to`` cannot hold
            it, or ``out`` is not empty.
        ValueError: If a layout is unknown.
    """
    to = _layout(to, "to")
    adapter, out = AdapterFolder(source), Path(out)
    known_base = find_base(adapter, base)
    found = detect(adapter, known_base)
    layout = found.layout
    if source_layout is not None:
        layout = _layout(source_layout, "source_layout")
        if layout not in found.possible:
            raise AdapterError(f"{source} is not in layout {layout}: {found.evidence[-1].says}; leave the layout out")
    if layout is None:
        raise AdapterError(f"the layout of {source} cannot be told: {found.reason}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not empty; choose another folder, or remove it")
    config, metadata = dict(adapter.config), {"format": "pt", **adapter.metadata, HEADER_KEY: to.header}
    outputs = list(_outputs(adapter, layout, to, known_base, config, metadata))
    if layout is not to:
        mark(config, to)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in adapter.path.iterdir():
        if file.is_file() and file.name not in (CONFIG, WEIGHTS):
            shutil.copy2(file, partial)
    write(partial / WEIGHTS, outputs, metadata)
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return layout


def find_base(adapter: AdapterFolder, base: str | Path | None) -> Base | None:
    """The base that is given, or the 16-bit checkpoint that the adapter names if it is a folder here."""
    if base is not None:
        return Base.read(base)
    named = Path(str(adapter.config.get("base_model_name_or_path") or ""))
    if not (named / "config.json").is_file():
        return None
    try:
        return Base.read(named)
    except ValueError:  # A packed base, or one of an unknown family, tells nothing about shapes.
        return None


def _layout(text: Layout | str, argument: str) -> Layout:
    try:
        return Layout(text)
    except ValueError:
        raise ValueError(f"{argument} is {text!r}, expected one of {', '.join(Layout)}") from None


def _outputs(
    adapter: AdapterFolder,
    layout: Layout,
    to: Layout,
    base: Base | None,
    config: dict[str, Any],
    metadata: dict[str, str],
) -> Iterator[Output]:
    moved: set[str] = set()
    if Layout.VLLM in (layout, to) and layout is not to and base is None:
        raise AdapterError(f"{adapter.path} names no base that is here; give --base, whose experts have the names")
    if layout is to:
        pass
    elif layout is Layout.VLLM:
        assert base is not None
        stacks, moved, blocks = restack(adapter, base)
        describe_stacks(adapter, stacks, moved, config)
        if blocks:
            metadata[BLOCKS_KEY] = "1"
        targeted = {stack.name for stack in stacks}
        for stack in stacks:
            nested = stack.name.removesuffix("gate_up_proj") + "down_proj" in targeted - {stack.name}
            yield from _stack_outputs(stack, nested, to, base.num_experts)
    elif to is Layout.VLLM:
        assert base is not None
        moved = {key for pair in adapter.stacks for key in (pair.a, pair.b)}
        if adapter.stacks:
            describe_experts(adapter, base, config)
            metadata.pop(BLOCKS_KEY, None)
            yield from unstack(adapter, layout, base)
    else:
        for pair in adapter.stacks:
            moved |= {pair.a, pair.b}
            yield from _rearranged(adapter, pair.a, pair.b, layout, to, num_experts(adapter, pair, base))
    for key in sorted(adapter.shapes.keys() - moved):
        yield Output(key, adapter.dtypes[key], adapter.shapes[key], lambda key=key: adapter.tensor(key))  # type: ignore[misc]


def _rearranged(adapter: AdapterFolder, a: str, b: str, layout: Layout, to: Layout, experts: int) -> Iterator[Output]:
    @lru_cache(maxsize=1)
    def read() -> tuple[Tensor, Tensor]:
        return join(to, *split(layout, adapter.tensor(a), adapter.tensor(b), experts))

    (rows, a_cols), (b_rows, _) = adapter.shapes[a], adapter.shapes[b]
    if layout.swapped != to.swapped:
        a_cols, b_rows = b_rows, a_cols
    yield Output(a, adapter.dtypes[a], (rows, a_cols), lambda: read()[0])
    yield Output(b, adapter.dtypes[b], (b_rows, rows), lambda: read()[1])


def _stack_outputs(stack: Stack, nested: bool, to: Layout, experts: int) -> Iterator[Output]:
    @lru_cache(maxsize=1)
    def read() -> tuple[Tensor, Tensor]:
        return join(to, *stack.read())

    outputs, inputs = stack.sizes if not to.swapped else stack.sizes[::-1]
    key = PREFIX + stack.name.rpartition(".")[0] + (".base_layer" if nested else "")
    yield Output(f"{key}.lora_A.weight", stack.dtype, (experts * stack.rank, inputs), lambda: read()[0])
    yield Output(f"{key}.lora_B.weight", stack.dtype, (outputs, experts * stack.rank), lambda: read()[1])
