"""Load a real server on this machine: overload, memory over many requests, a killed model process.

    python -m benchmarks.serve_load --requests 2000 --clients 32

The scorer is a stub whose score tells the clip, so that a lost, doubled or exchanged answer shows.
Prints one JSON object; the exit status is 1 when an answer is lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_QUEUE = 16
MAX_BATCH = 4
NUM_SHADES = 256
PAUSE_SECONDS = 0.02


def stub() -> Any:
    """A scorer that takes a fixed time for a batch and scores a clip's brightness."""
    from cac_reward.report import AnomalyReport

    class Stub:
        name = "stub"

        def inspect(self, videos: Sequence[Any], prompts: Sequence[str]) -> list[AnomalyReport]:
            time.sleep(PAUSE_SECONDS)
            return [
                AnomalyReport(
                    score=video.frames.float().mean().item() / 255,
                    judge_id="stub",
                    fps=video.fps,
                    num_frames=video.num_frames,
                    prompt=prompt,
                )
                for video, prompt in zip(videos, prompts, strict=True)
            ]

    return Stub()


@dataclass
class Load:
    """What became of many requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        shares = {"p50_seconds": 0.5, "p99_seconds": 0.99}
        return {
            **self.statuses,
            "wrong": self.wrong,
            **{name: round(ordered[round(share * last)], 3) for name, share in shares.items()},
        }


@contextmanager
def running_server() -> Iterator[tuple[int, int]]:
    """Process id and port of a server that is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "cac_reward.server", "--port", "0"]
        command += ["--scorer", "benchmarks.serve_load:stub", "--max-queue", str(MAX_QUEUE)]
        command += ["--max-batch", str(MAX_BATCH), "--num-decoders", "1"]
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={**environment, "TMPDIR": folder}, stdout=output, stderr=output
            )
        try:
            while (found := re.search(r"serving .*:(\d+)\n", log.read_text())) is None:
                if process.poll() is not None:
                    raise RuntimeError(f"server ended with {process.returncode}: {log.read_text()}")
                time.sleep(0.05)
            yield process.pid, int(found.group(1))
        finally:
            process.terminate()
            process.wait(60)


def body_of(shade: int) -> bytes:
    """A request for one clip of 8 frames 64x64, all of one shade."""
    import torch
    from safetensors.torch import save

    frames = torch.full((8, 3, 64, 64), shade, dtype=torch.uint8)
    text = base64.b64encode(save({"frames": frames})).decode()
    return json.dumps({"videos": [{"safetensors": text, "fps": 8.0}]}).encode()


def ask(port: int, body: bytes) -> tuple[int, Any, float]:
    """Status, answer, and what Retry-After says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        wait = float(answer.headers.get("Retry-After", 0))
        return answer.status, json.loads(answer.read()), wait
    finally:
        connection.close()


def send(port: int, bodies: Sequence[bytes], count: int, clients: int, *, retries: bool) -> Load:
    """Ask `count` times from many threads; with `retries`, until the answer is not 429."""
    load, lock = Load(), threading.Lock()

    def one(number: int) -> None:
        shade = number % NUM_SHADES
        began = time.monotonic()
        status, answer, _ = ask(port, bodies[shade])
        while retries and status == 429:
            time.sleep(0.05)
            status, answer, _ = ask(port, bodies[shade])
        with lock:
            load.statuses[str(status)] += 1
            load.seconds.append(time.monotonic() - began)
            if status == 200:
                result = answer["results"][0]
                right = len(answer["results"]) == 1 and result["status"] == "scored"
                load.wrong += not (right and abs(result["score"] - shade / 255) < 1e-5)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(one, range(count)))
    return load


def processes(server: int) -> dict[str, int]:
    """The server and its children by name."""
    found = {"server": server}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            module = re.search(r"cac_reward\.server\.(\w+)", command)
            if parent == server and module:
                found[module.group(1)] = int(folder.name)
    return found


def memory(server: int) -> dict[str, float]:
    """Resident MB of each process."""
    sizes = {}
    for name, pid in processes(server).items():
        status = Path(f"/proc/{pid}/status").read_text()
        sizes[name] = round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1)  # type: ignore[index]
    return sizes


def counter(port: int, line: str) -> float:
    """A sample of the metrics page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    values = [row.rpartition(" ") for row in page.splitlines()]
    return sum(float(value) for name, _, value in values if name == f"cac_reward_{line}")


def main() -> int:
    """Run the three trials; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000, help="requests of the memory trial")
    parser.add_argument("--clients", type=int, default=4 * MAX_QUEUE, help="at once, overloaded")
    options = parser.parse_args()
    bodies = [body_of(shade) for shade in range(NUM_SHADES)]
    scored = 'clips_total{status="scored"}'
    with running_server() as (server, port):
        overload = send(port, bodies, 4 * options.clients, options.clients, retries=False)
        counted = counter(port, scored)
        lost = 4 * options.clients - sum(overload.statuses[key] for key in ("200", "429"))
        lost += abs(counted - overload.statuses["200"])

        send(port, bodies, 200, MAX_QUEUE // 2, retries=True)  # Warm: pools and caches are filled.
        sizes = [memory(server)]
        began = time.monotonic()
        steady = Load()
        for _ in range(4):
            part = send(port, bodies, options.requests // 4, MAX_QUEUE // 2, retries=True)
            steady.statuses += part.statuses
            steady.seconds += part.seconds
            steady.wrong += part.wrong
            sizes.append(memory(server))
        rate = options.requests / (time.monotonic() - began)

        threading.Timer(1.0, os.kill, (processes(server)["judging"], signal.SIGKILL)).start()
        killed = send(port, bodies, 200, MAX_QUEUE // 2, retries=True)
        restarts = counter(port, "model_restarts_total")
        left = counter(port, "queued_clips")
    report = {
        "overload": {**overload.summary(), "clients": options.clients, "lost_or_doubled": lost},
        "steady": {**steady.summary(), "requests_per_second": round(rate, 1)},
        "memory_mb": sizes,
        "killed": {**killed.summary(), "restarts": restarts, "left_in_queue": left},
    }
    print(json.dumps(report, indent=2))
    fine = lost == left == 0 and restarts >= 1
    fine = fine and overload.wrong == steady.wrong == killed.wrong == 0
    fine = fine and set(steady.statuses) == set(killed.statuses) == {"200"}
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
