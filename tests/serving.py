"""A real server process for tests, and the scorer it may be started with instead of a judge."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cac_reward.server.lines import answer_lines, claim_stdout, say

REPOSITORY = Path(__file__).resolve().parent.parent


def stub() -> Any:
    """A scorer whose score tells the clip: its mean brightness. The prompt says how it behaves."""
    from cac_reward.report import AnomalyReport
    from cac_reward.video import Video

    class Stub:
        name = "stub"

        def inspect(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[AnomalyReport]:
            reports = []
            for video, prompt in zip(videos, prompts, strict=True):
                act, _, value = prompt.partition(" ")
                if act == "sleep":
                    time.sleep(float(value))
                elif act == "die":
                    os._exit(9)
                elif act == "die_once":
                    marker = Path(value)
                    if not marker.exists():
                        marker.touch()
                        os._exit(9)
                elif act == "raise":
                    raise ValueError(f"told to raise: {value}")
                error = "told not to know" if act == "unknown" else None
                score = None if error else video.frames.float().mean().item() / 255
                reports.append(
                    AnomalyReport(
                        score=score,
                        judge_id="stub",
                        fps=video.fps,
                        num_frames=video.num_frames,
                        prompt=prompt,
                        error=error,
                    )
                )
            return reports

    return Stub()


def plain_reward() -> Any:
    """A reward that is only a callable: the first frame's red; NaN for a dark clip."""

    def reward(videos: Any, prompts: Sequence[str], *, fps: float) -> Any:
        red = videos[:, 0, 0].mean((1, 2))
        red[red < 0.1] = math.nan
        return red

    return reward


def echo() -> None:
    """A child that answers what it is told: {"sleep": s}, {"end": status} or anything else."""
    answers = claim_stdout()
    print("this must not be taken for an answer")
    say(answers, {"ready": True, "token": os.environ.get("CAC_REWARD_TOKEN")})

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if "end" in message:
            os._exit(message["end"])
        time.sleep(message.get("sleep", 0))
        return message

    answer_lines(answers, answer)


class Server:
    """A running server: its address, its process, and plain requests to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, token: str | None = None
    ) -> None:
        self.process = process
        self.log = log
        self.token = token
        self.port = self._find_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _find_port(self) -> int:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            text = self.log.read_text(encoding="utf-8")
            if "serving " in text:
                return int(text.partition("serving ")[2].partition("\n")[0].rpartition(":")[2])
            if self.process.poll() is not None:
                raise RuntimeError(f"server ended with {self.process.returncode}: {text}")
            time.sleep(0.02)
        raise RuntimeError(f"server was not ready: {self.log.read_text(encoding='utf-8')}")

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is JSON) and headers of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        if self.token is not None:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers.get_content_type()
            found = json.loads(text) if kind == "application/json" else text
            return answer.status, found, dict(answer.headers)
        finally:
            connection.close()

    def score(self, *videos: dict[str, Any], **more: object) -> list[dict[str, Any]]:
        """Results of our own route, which must answer with 200."""
        status, body, _ = self.ask("POST", "/v1/score", {"videos": list(videos), **more})
        assert status == 200, body
        return body["results"]

    def children(self, module: str) -> list[int]:
        """Process ids of the children that run a module of the server."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                status = (folder / "status").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = next(line for line in status.splitlines() if line.startswith("PPid:"))
            own = int(parent.split()[1]) == self.process.pid and "State:\tZ" not in status
            if own and f"cac_reward.server.{module}".encode() in command:
                found.append(int(folder.name))
        return found

    def metric(self, line: str) -> float:
        """A sample of the metrics page; 0 where it is not there yet."""
        for row in self.ask("GET", "/metrics")[1].splitlines():
            name, _, value = row.rpartition(" ")
            if name == f"cac_reward_{line}":
                return float(value)
        return 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def running_server(*arguments: str, **variables: str) -> Iterator[Server]:
    """A server on a free port, stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "cac_reward.server", "--port", "0", *arguments]
        environment = {**os.environ, "TMPDIR": folder, **variables}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output
            )
        try:
            yield Server(process, log, variables.get("CAC_REWARD_TOKEN"))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


if __name__ == "__main__":
    echo()
