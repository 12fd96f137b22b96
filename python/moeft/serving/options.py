"""How a file is served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """Settings of a server.

    Attributes:
        host: Address to listen at.
        port: Port to listen at; 0 for any that is free.
        context: Tokens of a conversation, prompt and reply; 0 for as many as the model was trained with.
        parallel: Conversations at once; each has its own context.
        threads: Threads that compute; None for as many as llama.cpp takes.
        gpu_layers: Layers to hold on a GPU, where llama.cpp was built for one.
        exact: Caches in f32 and no flash attention: what a comparison with transformers needs, slower and larger.
        name: What ``/v1/models`` calls the model; default its file.
    """

    host: str = "127.0.0.1"
    port: int = 0
    context: int = 4096
    parallel: int = 1
    threads: int | None = None
    gpu_layers: int = 0
    exact: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 (any) to 65535")
        for field, least in (("context", 0), ("parallel", 1), ("gpu_layers", 0), ("threads", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}, expected at least {least}")
