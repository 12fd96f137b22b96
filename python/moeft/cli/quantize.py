"""``moeft quantize``: a 16-bit checkpoint into a packed NF4 one."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a 16-bit Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    attention: Annotated[bool, typer.Option("--attention", help="Pack attention projections too.")] = False,
    mlp: Annotated[bool, typer.Option("--mlp", help="Pack dense and shared-expert projections too.")] = False,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Quantise the block scales too.")] = False,
    block_size: Annotated[int, typer.Option(help="Weights per scale: 64, 128, ... 4096.")] = 64,
) -> None:
    """Stream a checkpoint to packed NF4 experts, in bounded memory."""
    from moeft.checkpoint import quantize as quantize_checkpoint

    result = quantize_checkpoint(
        model,
        out,
        experts=True,
        attention=attention,
        mlp=mlp,
        double_quant=double_quant,
        block_size=block_size,
        progress=True,
    )
    print(result)
