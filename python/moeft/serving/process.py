"""Starts and stops the process of a llama.cpp server."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from moeft.errors import MissingExtraError, ServingError
from moeft.serving.client import Client
from moeft.serving.options import ServeOptions

LOG_LINES = 15


class Server:
    """A llama.cpp server that runs while the context is open.

    The server of the ``xllamacpp`` package is used, else a ``llama-server`` on the ``PATH``.

    Args:
        file: The GGUF file; of a split model the first.
        options: How to serve it.
        program: Path of a ``llama-server`` to use instead.
        start_seconds: Longest wait until the model is loaded.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If no server is installed.
        ServingError: On entering, if llama.cpp does not load the file.
    """

    def __init__(
        self,
        file: str | Path,
        options: ServeOptions | None = None,
        *,
        program: str | Path | None = None,
        start_seconds: float = 600,
    ) -> None:
        self.file, self.options = Path(file), options or ServeOptions()
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} does not exist; `moeft export gguf` writes such a file")
        self._start_seconds = start_seconds
        self._address = f"http://{self.options.host}:{self.options.port}"
        self._is_embedded = program is None and importlib.util.find_spec("xllamacpp") is not None
        self._program = None if self._is_embedded else program or shutil.which("llama-server")
        if not self._is_embedded and self._program is None:
            raise MissingExtraError(
                'no llama.cpp server is installed: pip install "moeft[gguf]", or install llama-server'
            )
        self._process: subprocess.Popen[str] | None = None
        self._client: Client | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # closed by __exit__
        try:
            answer = subprocess.PIPE if self._is_embedded else self._log
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=answer, stderr=self._log, text=True
            )
            self._await_health()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if self._client is not None:
            self._client.close()
            self._client = None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            if not self._is_embedded:
                process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._log.close()

    @property
    def address(self) -> str:
        """``http://host:port``; the OpenAI-compatible API lies below ``/v1``."""
        return self._address

    @property
    def client(self) -> Client:
        """A connection to the server, closed with it."""
        if self._client is None:
            self._client = Client(self._address)
        return self._client

    def wait(self) -> None:
        """Block until the server ends.

        Raises:
            ServingError: If it ends with an error.
        """
        assert self._process is not None
        if self._process.wait():
            raise self._failure("stopped")

    def _command(self) -> Sequence[str]:
        options = self.options
        if self._is_embedded:
            described = json.dumps(dataclasses.asdict(options))
            return [sys.executable, "-m", "moeft.serving.embedded", str(self.file), described]
        if options.port == 0:
            self._address = f"http://{options.host}:{_free_port(options.host)}"
        return [str(self._program), *_flags(self.file, options, self._address.rpartition(":")[2])]

    def _await_health(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_seconds
        if self._process.stdout is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(self._start_seconds):
                    raise self._too_late()
            self._address = self._process.stdout.readline().strip() or self._address
        while self._process.poll() is None:
            with Client(self._address) as client:
                if client.is_healthy():
                    return
            if time.monotonic() > deadline:
                raise self._too_late()
            time.sleep(0.05)
        raise self._failure("did not load")

    def _too_late(self) -> ServingError:
        return ServingError(f"llama.cpp did not load {self.file} within {self._start_seconds:.0f} seconds")

    def _failure(self, what: str) -> ServingError:
        assert self._process is not None
        code = self._process.wait()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        said = "\n  ".join(lines[-LOG_LINES:])
        return ServingError(f"llama.cpp {what} {self.file} ({end}); it said:\n  {said}")


def _flags(file: Path, options: ServeOptions, port: str) -> list[str]:
    """The options in the words of ``llama-server``."""
    words = ["--model", str(file), "--host", options.host, "--port", port, "--jinja", "--no-warmup"]
    words += ["--ctx-size", str(options.context * options.parallel), "--parallel", str(options.parallel)]
    words += ["--n-gpu-layers", str(options.gpu_layers), "--reasoning-format", "auto"]
    if options.threads is not None:
        words += ["--threads", str(options.threads), "--threads-batch", str(options.threads)]
    if options.exact:
        words += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--swa-full"]
    return [*words, "--alias", options.name] if options.name else words


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
