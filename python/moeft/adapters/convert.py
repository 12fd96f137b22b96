"""From one layout to another: elements are moved, never computed, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.adapters.base import Base
from moeft.adapters.describe import describe_experts, describe_stacks, mark
from moeft.adapters.detect import detect, num_experts
from moeft.adapters.folder import CONFIG, PREFIX, WEIGHTS, AdapterFolder, Pair
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
    if known_base is not None and known_base.transposed and (to.swapped or to is Layout.VLLM):
        raise AdapterError(
            f"{known_base.path} has stacks of [experts, in, out], which no PEFT swapped and vLLM takes as they are; "
            f"use layout {Layout.UNSLOTH if to.grouped else Layout.PEFT}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not empty; choose another folder, or remove it")
    config, metadata = dict(adapter.config), {"format": "pt", **adapter.metadata, HEADER_KEY: to.header}
    outputs = list(_outputs(adapter, layout, to, known_base, config, metadata))
    mark(config, to)
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in adapter.path.iterdir():
        if file.is_file() and file.name not in (CONFIG, WEIGHTS):
            shutil.copy2(file, unfinished)
    write(unfinished / WEIGHTS, outputs, metadata)
    (unfinished / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
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
        yield from _stacked(stacks, to, base.num_experts)
    else:
        moved = {key for pair in adapter.stacks for key in (pair.a, pair.b)}
        if to is not Layout.VLLM:
            yield from _rearranged(adapter, layout, to, base)
        elif adapter.stacks:
            assert base is not None
            describe_experts(adapter, base, config)
            metadata.pop(BLOCKS_KEY, None)
            yield from unstack(adapter, layout, base)
    for key in sorted(adapter.shapes.keys() - moved):
        yield Output(key, adapter.dtypes[key], adapter.shapes[key], partial(adapter.tensor, key))


def _rearranged(adapter: AdapterFolder, layout: Layout, to: Layout, base: Base | None) -> Iterator[Output]:
    @lru_cache(maxsize=1)  # A and B of a stack are written one after the other, and memory holds one stack.
    def read(pair: Pair) -> tuple[Tensor, Tensor]:
        factors = adapter.tensor(pair.a), adapter.tensor(pair.b)
        return join(to, *split(layout, *factors, num_experts(adapter, pair, base)))

    for pair in adapter.stacks:
        (rows, inputs), (outputs, _) = adapter.shapes[pair.a], adapter.shapes[pair.b]
        if layout.swapped != to.swapped:
            inputs, outputs = outputs, inputs
        yield Output(pair.a, adapter.dtypes[pair.a], (rows, inputs), partial(_item, read, pair, 0))
        yield Output(pair.b, adapter.dtypes[pair.b], (outputs, rows), partial(_item, read, pair, 1))


def _stacked(stacks: Sequence[Stack], to: Layout, experts: int) -> Iterator[Output]:
    @lru_cache(maxsize=1)
    def read(stack: Stack) -> tuple[Tensor, Tensor]:
        return join(to, *stack.read())

    targeted = {stack.name for stack in stacks}
    for stack in stacks:
        module, _, name = stack.name.rpartition(".")
        nested = ".base_layer" if name == "gate_up_proj" and f"{module}.down_proj" in targeted else ""
        outputs, inputs = stack.sizes[::-1] if to.swapped else stack.sizes
        for index, (factor, shape) in enumerate(
            (("A", (experts * stack.rank, inputs)), ("B", (outputs, experts * stack.rank)))
        ):
            key = f"{PREFIX}{module}{nested}.lora_{factor}.weight"
            yield Output(key, stack.dtype, shape, partial(_item, read, stack, index))


def _item(read: Callable[[Any], tuple[Tensor, Tensor]], what: Any, index: int) -> Tensor:
    return read(what)[index]
