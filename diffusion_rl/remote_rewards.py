"""Rewards that are computed elsewhere: in a process of their own, or by a server over HTTP.

Axes: B videos, F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffusion_rl.processes import environment_alone, own_gpu
from diffusion_rl.reward_contract import (
    TIMEOUT_SECONDS,
    RewardFailed,
    RewardRefused,
    RewardSettings,
)
from diffusion_rl.reward_worker import read_message, write_message

LAST_LINES = 20
"""Lines of a dead process's standard error that the error shows."""
END_SECONDS = 10.0
"""How long a process may take to end once it closed its output."""
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
ROUTE = "/v1/score"


class ProcessReward:
    """A reward built and asked in a process of its own.

    Reports come back as plain dictionaries (what their `to_dict` says) or texts. A process that
    has died is started again when it is next asked, so `retries` covers that, too. What the reward
    starts ends with it, but for what leaves its session (`start_new_session`).

    Args:
        settings: target and options of the reward; timeout_seconds of its start and of each call.

    Raises:
        RewardFailed: The process did not start; its last lines are in the text.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._seconds = settings.timeout_seconds or TIMEOUT_SECONDS
        self._lock = threading.Lock()
        self._closed = False
        with self._lock:
            self._start()

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict[str, Any]:
        """Ask the process; one call at a time.

        Args:
            videos: [B F 3 H W] float in [0, 1]; sent as they are.
            prompts: B texts.
            fps: Frames per second.

        Raises:
            RewardFailed: The reward raised, or the process died or took too long.
            ValueError: The reward's answer breaks the contract.
        """
        with self._lock:
            if self._closed:
                raise RewardRefused("its process was closed")
            if self._has_ended():
                self._start()
            header, tensors = self._ask({"prompts": list(prompts), "fps": fps}, {"videos": videos})
        if "failed" in header:
            raise RewardFailed(f"raised {header['failed']} in its process")
        if "refused" in header:
            raise RewardRefused(header["refused"])
        return {"reports": header["reports"], **tensors}

    def close(self) -> None:
        """End the process and what it started; a call under way fails."""
        self._closed = True
        if not self._has_ended():
            _kill_group(self._process)
            self._process.wait()

    def _has_ended(self) -> bool:
        """Whether the process is no more; then what it started is ended, too."""
        if self._process.returncode is not None:  # As was seen before, and done.
            return True
        if self._process.poll() is None:
            return False
        _kill_group(self._process)
        return True

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "diffusion_rl.reward_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **environment_alone(),
                "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            },
            start_new_session=True,  # Ctrl-C is for the run, which ends this process itself.
        )
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._reader.start()
        own = self._settings
        settings = {"name": own.name, "target": own.target, "options": own.options}
        self._ask({"settings": settings, "gpu": own_gpu()}, {})

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Keep the last lines that the process writes, so that it is never held up by them."""
        assert process.stderr is not None
        for line in process.stderr:
            self._last.append(line.decode("utf-8", "replace").rstrip())

    def _ask(
        self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send a message and wait for its answer, until the time is over."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill_group(process)

        timer = threading.Timer(self._seconds, expire)
        timer.start()
        try:
            write_message(process.stdin, header, tensors)
            reply = read_message(process.stdout)
        except BrokenPipeError:
            reply = None
        finally:
            timer.cancel()
        if reply is not None:
            return reply
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        _kill_group(process)
        status = process.wait()
        self._reader.join(END_SECONDS)
        last = "\n".join(self._last) or "nothing"
        if expired.is_set():
            happened = f"took longer than {self._seconds:g} s and was ended"
        else:
            happened = f"ended with status {status}"
        raise RewardFailed(f"its process {happened}; the last it wrote: {last}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started, which may hold its pipes and memory of the GPU."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    # Its group bears its number, which no other gets as long as one of the group is there. Where
    # all of them have ended and nobody has asked for their status, macOS speaks of permissions.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class HttpReward:
    """A reward that a server computes: `POST /v1/score` of `cac-reward serve`, or any that speaks
    the same schema (docs/serving.md).

    Pixels are sent as bytes, lossless up to the rounding to 8 bits. What the server could not judge
    is NaN, with the server's words as its report; blame does not come over this route. May be used
    by several threads at once.

    Args:
        url: for example 'http://127.0.0.1:8000'.
        timeout_seconds: for one request.
        token_variable: name of the environment variable that holds the server's token, if it wants
            one; sent in the clear over http.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        token_variable: str | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"target must be http://HOST or https://HOST, got {url!r}")
        self._address = (parts.scheme, parts.hostname, parts.port)
        self._path = parts.path.rstrip("/") + ROUTE
        self._name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._path}"
        self._seconds = timeout_seconds
        self._headers = {"Content-Type": "application/json"}
        if token_variable is not None:
            if token_variable not in os.environ:
                raise ValueError(
                    f"token_variable must be set in the environment, got no {token_variable}"
                )
            self._headers["Authorization"] = f"Bearer {os.environ[token_variable]}"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    @classmethod
    def from_settings(cls, settings: RewardSettings) -> HttpReward:
        """The reward that a configuration describes.

        Raises:
            ValueError: An option is unknown, or the token is not there.
        """
        unknown = set(settings.options) - {"token_variable"}
        if unknown:
            raise ValueError(
                f"options of reward '{settings.name}' must be token_variable or none with where: "
                f"http, got {', '.join(sorted(unknown))}; a judge's own are options of its server"
            )
        seconds = settings.timeout_seconds or TIMEOUT_SECONDS
        return cls(settings.target, timeout_seconds=seconds, **settings.options)

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict[str, Any]:
        """Ask the server about a batch, in one request.

        Args:
            videos: [B F 3 H W] float in [0, 1].
            prompts: B texts.
            fps: Frames per second.

        Raises:
            RewardFailed: The server cannot be reached, is busy or failed; asking again may help.
            RewardRefused: It refuses the request, or its answer is not of the schema.
        """
        if len(prompts) != len(videos):
            raise ValueError(f"prompts must be one per video ({len(videos)}), got {len(prompts)}")
        pixels = (videos * 255).round().to(torch.uint8).cpu()
        body = {
            "videos": [
                {"safetensors": _packed(one), "prompt": prompt, "fps": fps}
                for one, prompt in zip(pixels, prompts, strict=True)
            ],
            "deadline_seconds": self._seconds,
            "reports": False,
        }
        results = self._post(json.dumps(body).encode()).get("results")
        if not isinstance(results, list) or len(results) != len(prompts):
            raise RewardRefused(
                f"{self._name} must answer {len(prompts)} results, got {results!r:.200}"
            )
        scores = [_score(one, self._name) for one in results]
        errors = [one.get("error") for one in results]
        return {"score": torch.tensor(scores), "reports": errors}

    def close(self) -> None:
        """End every request under way, and refuse others."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):  # The server may have ended it just now.
                        connection.sock.shutdown(2)

    def _post(self, data: bytes) -> dict[str, Any]:
        scheme, host, port = self._address
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=self._seconds)
        with self._lock:
            self._open.add(connection)
        try:
            if self._closed.is_set():
                raise RewardRefused(f"{self._name} is not asked any more")
            connection.request("POST", self._path, data, self._headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
            after = answer.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException) as error:
            raise RewardFailed(f"{self._name}: {type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if status in TRANSIENT_STATUSES:
            seconds = float(after) if after.isdecimal() else 0.0
            raise RewardFailed(f"{self._name} answered {status}: {_short(text)}", seconds)
        if status != 200:
            raise RewardRefused(f"{self._name} answered {status}: {_short(text)}")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise RewardRefused(f"{self._name} must answer in JSON, got {_short(text)}") from error
        if not isinstance(found, dict):
            raise RewardRefused(f"{self._name} must answer an object, got {_short(text)}")
        return found


def _packed(frames: Tensor) -> str:
    return base64.b64encode(save({"frames": frames.contiguous()})).decode()


def _score(result: Any, name: str) -> float:
    score = result.get("score", 0) if isinstance(result, dict) else ""
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise RewardRefused(f"{name} must answer finite scores or null, got {result!r:.200}")
    return float(score)


def _short(text: bytes) -> str:
    return text[:500].decode("utf-8", "replace")
