"""``moeft imatrix``: which columns of the weights matter to the quantisers of ``moeft export gguf``."""

from pathlib import Path
from typing import Annotated

import typer


def imatrix(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, 16-bit or packed.")],
    data: Annotated[Path, typer.Argument(help="File of rows, in any format of docs/data.md.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write; must not exist.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to measure, drawn by --seed.")] = 200,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights that are not in 4 bits.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
) -> None:
    """Measure llama.cpp's importance matrix, expert by expert."""
    from moeft.runs.imatrix import run

    run(model, data, out, rows=rows, max_length=max_length, dtype=dtype, device=device, seed=seed)
