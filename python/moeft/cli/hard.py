"""``moeft hard``: preference pairs that aim at what a model gets wrong."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="hard", no_args_is_help=True, help="Hard preference pairs for an assistant with tools.")

Tools = Annotated[Path, typer.Option(help="Schemas of the tools, OpenAI's JSON.")]
Protocol = Annotated[str, typer.Option(help="How calls are written: bracket, gemma, openai, glaive, hermes or python.")]


@app.command()
def build(
    tools: Tools,
    seeds: Annotated[Path, typer.Option(help="Chat rows with calls, in any format of docs/data.md.")],
    out: Annotated[Path, typer.Option(help="JSON lines file of pairs to write.")],
    protocol: Protocol = "bracket",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Hard pairs to make.")] = 1000,
    easy: Annotated[Path | None, typer.Option(help="Preference rows to mix in.")] = None,
    share: Annotated[float, typer.Option(help="Share of hard pairs, with --easy.")] = 0.3,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Requests of an evaluation, not to be trained on; repeat it.")
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="targets.json of `moeft hard analyze`.")] = None,
    reasoned_every: Annotated[
        int, typer.Option(min=0, help="Every so-many-th pair keeps right reasoning in both answers; 0 for none.")
    ] = 5,
    augment: Annotated[float, typer.Option(min=0, max=1, help="Share of requests asked in other words.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of every choice.")] = 0,
) -> None:
    """Make hard pairs from tools and conversations, check each, and mix them with easy ones."""
    from moeft.hard.targets import Targets
    from moeft.runs.hard import BuildSettings, Toolbox, build_pairs

    build_pairs(
        Toolbox.read(tools, protocol),
        seeds,
        out,
        BuildSettings(count, share, reasoned_every, augment, seed),
        exclude=exclude or (),
        easy=easy,
        targets=None if targets is None else Targets.read(targets),
    )


@app.command()
def analyze(
    tools: Tools,
    benchmark: Annotated[Path, typer.Option(help="Chat rows that end with the right calls.")],
    out: Annotated[Path, typer.Option(help="Folder for the analysis.")],
    protocol: Protocol = "bracket",
    outputs: Annotated[Path | None, typer.Option(help="Replies of a model, one record each.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint to ask, in place of --outputs.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter on the model; repeat it, lowest first.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights that are not in 4 bit.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Where to compute; default a GPU if there is one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
) -> None:
    """Find what a model gets wrong, and what to train against it."""
    if (outputs is None) == (model is None):
        raise typer.BadParameter("give --outputs or --model, and not both")
    from moeft.runs.generated import Speaker
    from moeft.runs.hard import Toolbox, analyze_replies, read_replies

    toolbox = Toolbox.read(tools, protocol)
    requests = toolbox.requests(benchmark, print)
    if outputs is not None:
        replies = read_replies(outputs)
    elif model is not None:
        speaker = Speaker(model, tuple(adapter or ()), dtype, max_new_tokens=max_new_tokens, device=device)
        replies = speaker.replies(*speaker.load(), requests, toolbox)
    analyze_replies(toolbox, requests, replies, out)
    print(f"Analysis: {out}")


@app.command()
def iterate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to replace, such as rounds=2.")
    ] = None,
) -> None:
    """Analyse, build, tune, and again, as long as held-out requests gain from it."""
    from moeft.config.iterate import IterateRecipe

    loaded = IterateRecipe.load(recipe, overrides or ())
    from moeft.runs.iterate import run

    print(f"Run folder: {run(loaded).path}")
