"""A model behind an OpenAI-compatible API, such as llama.cpp's server, as the subject of an evaluation."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.request import Answer, Chat, Request

TRIES = 4
FIRST_PAUSE_SECONDS = 0.5
BUSY = 429


class ServerSubject:
    """Asks a server for replies; it has no log-probabilities of given texts.

    A request that times out, or that the server answers with 429 or 5xx, is sent again after pauses of 0.5, 1 and 2
    seconds. After that, and at once for any other refusal, the item is marked with the error, never with a score.

    Args:
        url: Of the API, such as ``http://localhost:8080``; ``/v1`` may be part of it.
        model: Name that is sent along; servers of one model ignore it.
        parallel: Requests at once.
        timeout_seconds: For one request.
        api_key: Sent as a bearer token, if there is one.
        first_pause_seconds: Pause before the second try; each further one is twice as long.
        identity: What its answers depend on, where it is known better than by address and name.
    """

    def __init__(
        self,
        url: str,
        model: str = "default",
        *,
        parallel: int = 4,
        timeout_seconds: float = 300.0,
        api_key: str | None = None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        identity: dict[str, Any] | None = None,
    ) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self._url, self._model = f"{root}/v1/chat/completions", model
        self._parallel, self._timeout, self._api_key = parallel, timeout_seconds, api_key
        self._pause = first_pause_seconds
        self._identity = identity or {"server": self._url, "model": self._model}

    @property
    def identity(self) -> dict[str, Any]:
        """By default address and name: whoever puts another model there should use another cache."""
        return self._identity

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield replies as they come, and errors of those that stay without one.

        Raises:
            DataError: If a request asks for log-probabilities.
        """
        chats = only_chats(requests)
        with ThreadPoolExecutor(self._parallel) as pool:
            futures = {pool.submit(self._reply, chat): index for index, chat in enumerate(chats)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _reply(self, chat: Chat) -> Answer:
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                return _read_reply(self._post(chat))
            except urllib.error.HTTPError as error:
                reason = f"the server answered {error.code}: {_detail(error)}"
                if error.code != BUSY and error.code < 500:
                    return {"error": reason}
            except (OSError, ValueError, http.client.HTTPException) as error:  # No connection, or half an answer.
                reason = f"no answer from {self._url}: {error}"
        return {"error": f"{reason} ({TRIES} tries)"}

    def _post(self, chat: Chat) -> Any:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(message) for message in chat.messages],
            "max_tokens": chat.max_new_tokens,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "seed": chat.seed,
        }
        if chat.tools:
            body["tools"] = [dict(tool) for tool in chat.tools]
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            return json.load(response)


def only_chats(requests: Sequence[Request]) -> list[Chat]:
    """Requests that a server can answer.

    Raises:
        DataError: If one asks for log-probabilities.
    """
    chats = [request for request in requests if isinstance(request, Chat)]
    if len(chats) < len(requests):
        raise DataError(
            "a server gives no log-probabilities of given texts; evaluate tasks of choices and perplexity on the "
            "checkpoint's folder"
        )
    return chats


def _read_reply(answered: Any) -> Answer:
    try:
        message = answered["choices"][0]["message"]
        answer: Answer = {"reply": message.get("content") or ""}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer without a message: {json.dumps(answered)[:200]}") from error
    if message.get("tool_calls"):
        answer["tool_calls"] = message["tool_calls"]
    return answer


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(400).decode("utf-8", "replace").split())[:200] or error.reason
    except OSError:
        return str(error.reason)
