"""``moeft adapter``: what an adapter is, and the same adapter in another layout."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="adapter", no_args_is_help=True, help="Verify and convert adapters of experts.")

Base = Annotated[
    Path | None, typer.Option(help="16-bit base checkpoint; default the one that the adapter names, if it is there.")
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help="Layout to write: peft, peft018, unsloth, unsloth018 or vllm.")],
    source_layout: Annotated[
        str | None, typer.Option("--from", help="Layout of IN, where the data leaves more than one.")
    ] = None,
    base: Base = None,
) -> None:
    """Write an adapter in the layout of another tool, bit for bit."""
    from moeft.adapters import convert as convert_adapter

    found = convert_adapter(source, out, to, source_layout=source_layout, base=base)
    print(f"{source} ({found}) written to {out} ({to})")


@app.command()
def verify(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    base: Base = None,
) -> None:
    """Say which layout an adapter is in and what is wrong with it: exit 1 for a problem, 2 if nobody can tell."""
    from moeft.adapters import verify as verify_adapter

    found = verify_adapter(adapter, base)
    print(found)
    if found.layout is None:
        print(f"moeft: error: the layout of {adapter} cannot be told: {found.detection.reason}", file=sys.stderr)
        raise typer.Exit(2)
    if found.problems:
        raise typer.Exit(1)
