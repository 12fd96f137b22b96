"""``moeft export``: checkpoints for other programs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="export", help="Write a checkpoint for other programs.", no_args_is_help=True)


@app.callback()
def _about() -> None:
    """Write a checkpoint for other programs."""


@app.command()
def gguf(
    model: Annotated[Path, typer.Argument(help="Folder of a 16- or 32-bit Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="File to write, *.gguf; must not exist.")],
    type: Annotated[
        str, typer.Option("--type", help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.", show_default=True)
    ] = "q4_k_m",
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="PATTERN=TYPE, such as 'ffn_down_exps=q6_k'; may be repeated.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Split into files of at most this, such as 4GB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print types and sizes, write nothing.")] = False,
) -> None:
    """Stream a checkpoint to GGUF, the file of llama.cpp, in bounded memory."""
    from moeft import gguf as library
    from moeft.planning.sizes import parse_bytes

    kind = next((known for known in library.FILE_TYPES if known == type.lower()), None)
    if kind is None:
        raise ValueError(f"--type is {type!r}, expected one of {', '.join(library.FILE_TYPES)}")
    overrides = dict(_override(text) for text in tensor_type or ())
    size = None if max_shard_size is None else parse_bytes(max_shard_size)
    if dry_run:
        print(library.plan(model, out, type=kind, tensor_types=overrides, max_shard_bytes=size))
    else:
        print(library.export(model, out, type=kind, tensor_types=overrides, max_shard_bytes=size, progress=True))


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"--tensor-type is {text!r}, expected PATTERN=TYPE such as 'ffn_down_exps=q6_k'")
    return pattern, kind
