"""A chat server in this process or one of its own, whose model agrees with every annotation.

Run as `python -m tests.teacher_server`; prints its port. Tests give it another function to answer
by, and read what it was sent and how many requests it had at once.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = Callable[[Body], tuple[int, Any]]
"""From a request to a status and JSON, bytes, or (JSON, headers)."""

PROSE = "A square moves to the right over a grey ground."


def said(
    answer: object, *, finish: str = "stop", tokens: tuple[int, int] | None = (100, 10)
) -> Body:
    """An answer of the chat API."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": text},
    }
    usage = {}
    if tokens is not None:
        read, written = tokens
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": sum(tokens)}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return {**head, "choices": [choice], "usage": usage or None}


def texts(body: Body) -> str:
    """Everything that a request says, without its pictures."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(found)


def pictures(body: Body) -> int:
    """How many pictures a request shows."""
    return json.dumps(body["messages"]).count("data:image/png;base64,")


def annotation(body: Body) -> dict[str, Any] | None:
    """The annotation that a request quotes; None for a question without one."""
    found = re.findall(r"<annotation>\n(.*)\n</annotation>", texts(body))
    return json.loads(found[-1]) if found else None


def agreeing(body: Body) -> dict[str, Any]:
    """What a teacher says that believes the annotation; without one it sees nothing wrong."""
    known = annotation(body)
    if known is None and "letter of the right option" in texts(body):
        return {"reasoning": PROSE, "answer": "A"}
    if known is None:
        return {"reasoning": PROSE, "findings": [], "verdict": "clean"}
    findings = [
        {"type": one["type"], "window": one["window"], "why": "it is gone at once"}
        for one in known.get("findings", ())
    ]
    verdict = {"findings": findings, "verdict": known["verdict"], "reasoning": PROSE}
    if "first_answer_is_right" not in texts(body):
        start = float(re.findall(r"from <([\d.]+) seconds> to", texts(body))[-1])
        event = {"window": {"start": start, "end": start + 0.1}, "what": "the square moves"}
        return {"scene": PROSE, "events": [event], **verdict}
    looked = {
        "first_answer_is_right": "your answer is right" in texts(body),
        "reflection": "The square should have been followed to the end.",
    }
    if "letter of the right option" in texts(body):
        return {**looked, "reasoning": PROSE, "answer": known["answer"]}
    return {**looked, **verdict}


@dataclass
class Seen:
    """What a server was sent."""

    address: str = ""
    bodies: list[Body] = field(default_factory=list)
    """Of requests, in the order in which they came, with the key's header as 'key'."""
    most: int = 0
    """Requests at once."""


def _handler(reply: Reply, seen: Seen) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                under_way += 1
                seen.most = max(seen.most, under_way)
                seen.bodies.append({**body, "key": self.headers["Authorization"]})
            status, content = reply(body)
            content, headers = content if isinstance(content, tuple) else (content, {})
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            with lock:
                under_way -= 1
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(reply: Reply = lambda body: (200, said(agreeing(body)))) -> Iterator[Seen]:
    """A server in this process; what it was sent."""
    seen = Seen()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(reply, seen))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    seen = Seen()
    handler = _handler(lambda body: (200, said(agreeing(body))), seen)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
