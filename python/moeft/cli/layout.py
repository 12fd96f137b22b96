"""``moeft layout``: experts of a checkpoint fused or taken apart."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Direction(StrEnum):
    """What to do with the experts."""

    FUSE = "fuse"
    UNFUSE = "unfuse"


def layout(
    direction: Annotated[Direction, typer.Argument(help="fuse: one tensor per stack; unfuse: one per expert.")],
    model: Annotated[Path, typer.Argument(help="Folder of a 16- or 32-bit Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Fuse the experts of a checkpoint into stacks or take them apart, bit for bit, in bounded memory."""
    from moeft.checkpoint import fuse_experts, unfuse_experts

    convert = fuse_experts if direction is Direction.FUSE else unfuse_experts
    print(convert(model, out, progress=True))
