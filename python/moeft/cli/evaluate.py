"""``moeft evaluate``: what a model can do, with intervals, and whether two models differ."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, a GGUF file, or the http(s) URL of a server.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names, separated by commas, each perhaps with its file: piqa,mmlu=rows.jsonl.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command goes on after a stop.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to load on the model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files; without, the hub is asked.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of a task, drawn by --seed.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Answered questions before each one of multiple choice.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies generated, or requests sent, at once.")] = 16,
    max_length: Annotated[int | None, typer.Option(min=2, help="Positions to use; default all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply; default the task's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of replies; 0 takes the most probable tokens.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Replies to each prompt, of seeds from --seed on.")] = 1,
    tool_protocol: Annotated[
        str | None, typer.Option(help="How calls of tools are written; `python` writes the tools into the prompt.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of a folder's weights that are not in 4 bit.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to compute with a folder's weights.")] = "cpu",
    cache: Annotated[Path | None, typer.Option(help="File of answers that several runs share.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of items, of sampling and of resampling.")] = 0,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two --out folders: print which differences are real.")
    ] = None,
) -> None:
    """Measure a model on tasks, each number with its interval; or compare two measurements."""
    from moeft.runs.evaluate import EvaluateSettings, run
    from moeft.runs.evaluate import compare as compare_runs

    if compare is not None:
        given = [name for name in context.params if name not in ("compare", "seed") and _is_given(context, name)]
        if given:
            options = ", ".join("MODEL" if name == "model" else "--" + name.replace("_", "-") for name in given)
            raise typer.BadParameter(f"--compare takes two folders and --seed alone, not {options}")
        print(compare_runs(*compare, seed=seed))
        return
    if model is None or tasks is None or out is None:
        raise typer.BadParameter("give MODEL, --tasks and --out, or --compare with two folders")
    settings = EvaluateSettings(
        model=model,
        tasks=tuple(tasks.split(",")),
        adapter=adapter,
        data=data,
        limit=limit,
        shots=shots,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        tool_protocol=tool_protocol,
        dtype=dtype,
        seed=seed,
    )
    print(f"Run folder: {run(settings, out, batch_size, device, cache).path}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
