"""``moeft export``: checkpoints for other programs."""

from pathlib import Path
from typing import Annotated, Any

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
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix of `moeft imatrix` or llama.cpp.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter trained on MODEL, merged while writing.")] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Write a Modelfile beside OUT, for `ollama create NAME -f`.")
    ] = False,
    context: Annotated[int, typer.Option(help="Tokens of a conversation, for --ollama.")] = 4096,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print types and sizes, write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the result in llama.cpp and compare with transformers and ggml.")
    ] = False,
    verify_text: Annotated[Path | None, typer.Option(help="Text to compare on; default one that is built in.")] = None,
) -> None:
    """Stream a checkpoint to GGUF, the file of llama.cpp, in bounded memory."""
    from moeft import gguf as library
    from moeft.gguf.ollama import modelfile
    from moeft.planning.sizes import parse_bytes

    kind = next((known for known in library.FILE_TYPES if known == type.lower()), None)
    if kind is None:
        raise ValueError(f"--type is {type!r}, expected one of {', '.join(library.FILE_TYPES)}")
    overrides = dict(_override(text) for text in tensor_type or ())
    size = None if max_shard_size is None else parse_bytes(max_shard_size)
    if verify and adapter is not None:
        raise ValueError(
            "--verify compares with a checkpoint, which --adapter does not write; merge it with `moeft merge`"
        )
    if ollama and size is not None:
        raise ValueError("--ollama needs one file, which --max-shard-size splits")
    recipe = modelfile(model, out, context) if ollama else None
    options: Any = {"type": kind, "tensor_types": overrides, "max_shard_bytes": size}
    if dry_run:
        print(library.plan(model, out, **options, imatrix=imatrix, adapter=adapter))
        return
    report = library.export(model, out, **options, imatrix=imatrix, adapter=adapter, progress=True)
    print(report)
    if recipe is not None:
        place = out.with_name(f"{out.stem}.Modelfile")
        place.write_text(recipe, "utf-8")
        print(place)
    if verify:
        _prove(model, [Path(report.files[0])], verify_text, "f32", imatrix)


@app.command()
def prove(
    model: Annotated[Path, typer.Argument(help="Folder of the checkpoint that the files were made from.")],
    files: Annotated[list[Path], typer.Argument(help="GGUF files; of a split model the first.")],
    text: Annotated[Path | None, typer.Option(help="Text to compare on; default one that is built in.")] = None,
    layout: Annotated[str, typer.Option(help="f32, or f16: the file with all weights that proves the layout.")] = "f32",
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix that the files were made with.")] = None,
) -> None:
    """Compare GGUF files with their checkpoint: layout and quality in llama.cpp, blocks with ggml; exit 1 if not."""
    _prove(model, files, text, layout, imatrix)


def _prove(model: Path, files: list[Path], text: Path | None, layout: str, imatrix: Path | None) -> None:
    from moeft.runs.gguf_proof import prove as run

    proof = run(model, files, text=text, layout_type=layout, imatrix=imatrix, show=print)
    print(proof)
    if proof.problems():
        raise typer.Exit(1)


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"--tensor-type is {text!r}, expected PATTERN=TYPE such as 'ffn_down_exps=q6_k'")
    return pattern, kind
