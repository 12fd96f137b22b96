"""Requests to a running llama.cpp server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

from moeft.errors import ServingError


class Client:
    """One connection, kept open between requests; not for several threads.

    Args:
        address: ``http://host:port``.
        timeout_seconds: Longest wait for an answer.
    """

    def __init__(self, address: str, timeout_seconds: float = 600) -> None:
        self.address = address
        place = urlsplit(address)
        if place.scheme != "http" or not place.hostname:
            raise ValueError(f"address is {address!r}, expected http://host:port")
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def is_healthy(self) -> bool:
        """Whether the server answers and has loaded its model."""
        try:
            return self.get("/health").get("status") == "ok"
        except ServingError:
            return False

    def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """What the model writes after a prompt, text or token ids; options as of llama.cpp's ``/completion``."""
        return self.post("/completion", {"prompt": prompt if isinstance(prompt, str) else list(prompt), **options})

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """The first choice of a chat completion: ``message`` and ``finish_reason``; options as of OpenAI."""
        answer = self.post("/v1/chat/completions", {"messages": list(messages), **options})
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included, without one that begins a sequence."""
        found: list[int] = self.post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return found

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path.

        Raises:
            ServingError: If the server does not answer, or answers with an error.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer to a request.

        Raises:
            ServingError: As of :meth:`get`.
        """
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServingError(f"{self.address}{path} does not answer ({error!r}); is the server running?") from error
        try:
            answer = json.loads(text)
        except ValueError:
            answer = text.decode(errors="replace")[:500]
        if response.status != 200 or not isinstance(answer, dict):
            message = answer.get("error", answer) if isinstance(answer, dict) else answer
            raise ServingError(f"{self.address}{path} answers {response.status}: {message}")
        return answer
