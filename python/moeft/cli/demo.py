"""``moeft demo``: the whole way on the embedded model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data, the adapter and the order of rows.")] = 0,
) -> None:
    """Quantise, fine-tune, merge and prove the embedded 7.6 M-parameter MoE, in minutes on a CPU."""
    from moeft.demo.run import run

    run(out, seed)
