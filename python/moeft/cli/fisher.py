"""``moeft fisher``: which weights the likelihood of some prompts depends on."""

from pathlib import Path
from typing import Annotated

import typer


def fisher(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, 16-bit or packed.")],
    prompts: Annotated[Path, typer.Option(help="File of rows, in any format of docs/data.md.")],
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on after an interruption.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to measure, drawn by --seed.")] = 200,
    labels: Annotated[
        str,
        typer.Option(
            help="data: the rows' assistant tokens. sampled: the model's own in their places. "
            "generated: its own replies to prompts, which need none."
        ),
    ] = "data",
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="attention, experts or mlp; repeat it. Default all.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template, by name or path; default the tokenizer's or its family's.")
    ] = None,
    train_on: Annotated[str, typer.Option(help="assistant, last, completion, messages or all.")] = "assistant",
    memory: Annotated[str, typer.Option(help="Most memory of the sums, besides the model's own.")] = "4GiB",
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a generated reply.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of the weights that are not in 4 bit.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the choice of rows, of sampled labels and of replies.")] = 0,
) -> None:
    """Measure the diagonal of the Fisher information of attention, experts and dense layers."""
    from moeft.planning.sizes import parse_bytes
    from moeft.runs.fisher import FisherSettings, run

    settings = FisherSettings(
        model=model,
        prompts=prompts,
        rows=rows,
        labels=labels,
        targets=tuple(targets) if targets else None,
        chat_template=chat_template,
        train_on=train_on,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        seed=seed,
    )
    print(f"Run folder: {run(settings, out, parse_bytes(memory), device).path}")
