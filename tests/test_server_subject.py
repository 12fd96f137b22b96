"""A server that answers, stumbles, hangs or refuses, on this machine."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moeft.errors import DataError
from moeft.evaluation.request import Chat, Choices
from moeft.evaluation.server_subject import TRIES, ServerSubject


@pytest.fixture
def server():
    """Answers by the first word of the request; counts how often each was sent."""
    sent: dict[str, int] = {}
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            sent[text] = sent.get(text, 0) + 1
            bodies.append(body)
            if text == "broken" or (text == "stumbles" and sent[text] < 3):
                return self._send(500, b'{"error": "out of slots"}')
            if text == "too long":
                return self._send(400, b'{"error": "context size exceeded"}')
            if text == "hangs":
                time.sleep(1.5)
            if text == "empty":
                return self._send(200, b'{"choices": []}')
            if text == "half":
                return self._send(200, b'{"choices": [{"mess', missing=40)
            message = {"content": f"reply to {text}"}
            if text == "calls":
                message = {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
            return self._send(200, json.dumps({"choices": [{"message": message}]}).encode())

        def _send(self, status, content, missing=0):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", sent, bodies
    running.shutdown()
    thread.join()
    running.server_close()


def ask(url: str, *texts: str, **options):
    subject = ServerSubject(url, first_pause_seconds=0.01, **options)
    found = dict(subject.answer([Chat(({"role": "user", "content": text},), 8, seed=4) for text in texts]))
    return [found[index] for index in range(len(texts))]


def test_replies_come_back_in_their_places(server):
    url, _, bodies = server
    assert ask(f"{url}/v1/", "one", "two", "calls") == [
        {"reply": "reply to one"},
        {"reply": "reply to two"},
        {"reply": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    assert {(body["max_tokens"], body["temperature"], body["seed"]) for body in bodies} == {(8, 0.0, 4)}


def test_error_of_the_server_is_tried_again_and_then_marked(server):
    url, sent, _ = server
    stumbles, broken, empty, half = ask(url, "stumbles", "broken", "empty", "half")
    assert stumbles == {"reply": "reply to stumbles"}
    assert broken == {"error": f'the server answered 500: {{"error": "out of slots"}} ({TRIES} tries)'}
    assert "an answer without a message" in empty["error"]
    assert "no answer from" in half["error"]
    assert sent == {"stumbles": 3, "broken": TRIES, "empty": TRIES, "half": TRIES}


def test_refusal_is_not_tried_again(server):
    url, sent, _ = server
    (answer,) = ask(url, "too long")
    assert answer == {"error": 'the server answered 400: {"error": "context size exceeded"}'}
    assert sent == {"too long": 1}


def test_timeout_marks_the_item(server):
    url, _, _ = server
    hangs, fine = ask(url, "hangs", "fine", timeout_seconds=0.2)
    assert "timed out" in hangs["error"]
    assert fine == {"reply": "reply to fine"}


def test_server_that_is_not_there_marks_the_item():
    (answer,) = ask("http://127.0.0.1:9", "x")
    assert answer["error"].startswith("no answer from http://127.0.0.1:9/v1/chat/completions")


def test_log_probabilities_are_not_asked_of_a_server():
    with pytest.raises(DataError, match="a server gives no log-probabilities"):
        next(ServerSubject("http://127.0.0.1:9").answer([Choices("a", (" b",))]))
