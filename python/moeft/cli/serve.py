"""``moeft serve``: a GGUF file behind an OpenAI-compatible address, by llama.cpp's own server."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    file: Annotated[Path, typer.Argument(help="GGUF file; of a split model the first.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8080,
    context: Annotated[int, typer.Option(help="Tokens of a conversation; 0 for the most that the model takes.")] = 4096,
    parallel: Annotated[int, typer.Option(help="Conversations at once, each with its own context.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads that compute; default llama.cpp's choice.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on a GPU, where llama.cpp was built for one.")] = 0,
    name: Annotated[str | None, typer.Option(help="What /v1/models calls the model; default its file.")] = None,
    program: Annotated[
        Path | None, typer.Option(help="A llama-server to use; default that of xllamacpp, else one on the PATH.")
    ] = None,
    smoke_test: Annotated[
        bool, typer.Option("--smoke-test", help="Ask for a completion, a reply and a tool call, print and exit.")
    ] = False,
) -> None:
    """Serve a GGUF file with llama.cpp until interrupted: /v1/chat/completions, /v1/completions, /health."""
    from moeft import serving

    options = serving.ServeOptions(host, port, context, parallel, threads, gpu_layers, name=name)
    with serving.Server(file, options, program=program) as server:
        if not smoke_test:
            print(f"{file} is served at {server.address}/v1; stop with Ctrl+C", flush=True)
            server.wait()
            return
        found = serving.smoke_test(server.client)
    print(found)
    if not found.passed:
        raise typer.Exit(1)
