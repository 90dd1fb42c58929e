"""A reward server in a thread that speaks the schema of docs/serving.md, and counts."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load

Reply = tuple[int, Any, dict[str, str]]


def by_redness(body: dict[str, Any]) -> Reply:
    """The mean of each clip's red; what the prompt calls unknown has no score."""
    results = []
    for video in body["videos"]:
        frames = load(base64.b64decode(video["safetensors"]))["frames"]
        score = frames[:, 0].double().mean().item() / 255
        if video["prompt"] == "unknown":
            results.append({"status": "unjudged", "score": None, "error": "told not to know"})
        else:
            results.append({"status": "scored", "score": score, "error": None})
    return 200, {"results": results}, {}


class ScoreServer:
    """What it was asked and how; `reply` may be exchanged at any time."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.received: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.seconds = 0.0
        """How long an answer takes."""
        self.most_at_once = 0
        self.finished = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.received.append((handler.path, body, dict(handler.headers)))
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        time.sleep(self.seconds)
        status, found, headers = self.reply(body)
        with self._lock:
            self._under_way -= 1
            self.finished += 1
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        with suppress(ConnectionError):  # Who asked may have gone.
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(text)


@contextmanager
def score_server(reply: Callable[[dict[str, Any]], Reply] = by_redness) -> Iterator[ScoreServer]:
    """A running server on a free port of this machine."""
    server = ScoreServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            listener.shutdown()
