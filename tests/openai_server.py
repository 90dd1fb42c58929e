"""A server with the chat API over a local judge: continues answers, returns log-probabilities.

Run as `python -m tests.openai_server JUDGE`; prints its port. With `--plain` it does neither, like
servers that only chat.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from cac_reward.judges.local import LocalJudge
from cac_reward.questions import Message

OPEN, CLOSE = "<tool_response>\n", "\n</tool_response>"


def read_message(record: dict[str, Any]) -> Message:
    """A message of the chat API as the judge has it."""
    if isinstance(record["content"], str):
        return Message(record["role"], (record["content"],))
    content: list[Any] = []
    for part in record["content"]:
        if part["type"] == "text":
            content.append(part["text"])
            continue
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        content.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    if content[0] == OPEN or str(content[0]).startswith(OPEN):
        content[0] = content[0].removeprefix(OPEN)
        content[-1] = content[-1].removesuffix(CLOSE)
        return Message("tool", tuple(part for part in content if not isinstance(part, str) or part))
    return Message("user", tuple(content))


def answer(judge: LocalJudge, body: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    messages, prefix = list(body["messages"]), ""
    if body.get("continue_final_message"):
        prefix = messages.pop()["content"]
    conversation = tuple(read_message(one) for one in messages)
    tools = body.get("tools", ())
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if body.get("logprobs"):
        with torch.inference_mode(), judge._lock:
            ((_, read),) = judge._reader.read([conversation], [prefix], tools)
        likely = torch.log_softmax(read.logits[0], 0).topk(body["top_logprobs"])
        top = [
            {"token": judge._tokenizer.decode([token]), "logprob": value, "bytes": None}
            for value, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
        ]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
        text = top[0]["token"]
    else:
        count = body.get("max_tokens") or 256
        (text,) = judge.generate([conversation], max_new_tokens=count, prefix=prefix, tools=tools)
        text = text.removeprefix(prefix)
    choice["message"] = {"role": "assistant", "content": text}
    read = judge._reader.renderer.tokenize([conversation], [prefix], tools)[0].tokens
    written = judge._tokenizer(text)["input_ids"]
    usage = {"prompt_tokens": len(read), "completion_tokens": len(written)}
    return {
        "usage": {**usage, "total_tokens": sum(usage.values())},
        **{"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]},
        "choices": [choice],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("judge")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = LocalJudge.from_pretrained(options.judge)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            refused = options.plain and {"logprobs", "continue_final_message"} & set(body)
            reply = {"error": {"message": f"unknown fields {refused}"}} if refused else None
            data = json.dumps(reply or answer(judge, body)).encode()
            self.send_response(400 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
