"""``moeft subspace``: the directions in which an instruct model differs from its base."""

from pathlib import Path
from typing import Annotated

import typer


def subspace(
    instruct: Annotated[Path, typer.Argument(metavar="IT", help="Folder of the instruct model, 16- or 32-bit.")],
    base: Annotated[Path, typer.Argument(metavar="PT", help="Folder of the model that it was tuned from.")],
    out: Annotated[Path, typer.Option(help="File to write; the same command goes on after an interruption.")],
    rank: Annotated[int, typer.Option(min=1, help="Directions of every matrix.")] = 256,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="attention, experts or mlp; repeat it. Default all.")
    ] = None,
    power_iterations: Annotated[int, typer.Option(min=0, help="More are slower and closer to the exact ones.")] = 2,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the random sketch.")] = 0,
) -> None:
    """Decompose the difference of every matrix, one at a time: attention, dense layers, each expert."""
    from moeft.runs.subspace import run

    print(run(instruct, base, out, rank, targets, power_iterations, seed, device))
