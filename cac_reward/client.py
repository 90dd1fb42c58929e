"""The reward of a server elsewhere, called as if it were here.

Axes: B videos, F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from cac_reward.frames import blame_maps
from cac_reward.inputs import Clip, check_prompts, check_videos, open_clip
from cac_reward.report import AnomalyReport

TRANSIENT_STATUSES = (429, 503)
MAX_PAUSE_SECONDS = 60.0


class ServerError(RuntimeError):
    """The server could not be reached or refused a whole request; its answer is in the text."""


class RemoteJudgement(TypedDict):
    """What the reward contract lets a reward return."""

    score: Tensor
    """[B] float32; NaN for what could not be judged."""
    blame: Tensor
    """[B F H' W'] in [0, 1]; H' and W' at most 128. Zeros where there is no report."""
    reports: list[AnomalyReport | dict[str, str] | None]
    """One for each video; where the server has none {"error": why it has no score}, or None."""


class RewardClient:
    """A reward that a server of `cac-reward serve` computes.

    Pixels are sent as bytes, lossless up to the rounding to 8 bits. An answer of 429 or 503 and a
    server that cannot be reached are tried again until `timeout_seconds` have passed. May be used
    by several threads at once.

    Args:
        base_url: for example 'http://127.0.0.1:8000'.
        token: what the server asks for; sent in the clear over http.
        timeout_seconds: for one call, all tries together.
        clips_per_request: videos sent together.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 600.0,
        clips_per_request: int = 8,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be http://HOST or https://HOST, got {base_url!r}")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}")
        if clips_per_request < 1:
            raise ValueError(f"clips_per_request must be at least 1, got {clips_per_request}")
        self.base_url = base_url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.clips_per_request = clips_per_request
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        # No redirects: they would carry the token to another address.
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> RemoteJudgement:
        """Score a batch of videos.

        Args:
            videos: [B F 3 H W] float in [0, 1], at least two frames.
            prompts: What each was generated from.
            fps: Frames per second of the videos.

        Raises:
            ValueError: If layout, range, rate or the number of prompts is wrong.
            ServerError: If the server cannot be reached or refuses the whole request.
        """
        check_videos(videos, fps)
        results = self.score(list(videos), prompts, fps=fps)
        reports = [_report(result) for result in results]
        _, num_frames, _, height, width = videos.shape
        blame = blame_maps(reports, num_frames, height, width, fps)
        scores = [math.nan if one["score"] is None else one["score"] for one in results]
        told = [
            {"error": result["error"]} if report is None and result["error"] else report
            for report, result in zip(reports, results, strict=True)
        ]
        return {"score": torch.tensor(scores), "blame": blame, "reports": told}

    def score(
        self,
        videos: Sequence[Clip],
        prompts: Sequence[str] | None = None,
        *,
        fps: float | None = None,
    ) -> list[dict[str, Any]]:
        """Score clips of any sizes.

        Args:
            videos: [F 3 H W] float in [0, 1], decoded videos, pictures, or files of this machine.
            prompts: What each was generated from; None where it is not known.
            fps: Frames per second; needed for tensors, and believed over a file's own rate.

        Returns:
            For each clip status, score, error and report, as the server sent them.

        Raises:
            ValueError: If a clip, the rate or the number of prompts is wrong.
            ServerError: If the server cannot be reached or refuses a whole request.
        """
        prompts = [""] * len(videos) if prompts is None else prompts
        check_prompts(prompts, len(videos))
        deadline = time.monotonic() + self.timeout_seconds
        results: list[dict[str, Any]] = []
        for start in range(0, len(videos), self.clips_per_request):
            rows = range(start, min(len(videos), start + self.clips_per_request))
            body = {
                "videos": [_packed(videos[row], prompts[row], fps) for row in rows],
                "deadline_seconds": max(deadline - time.monotonic(), 0.001),
            }
            answer = self._post("/v1/score", body, deadline)
            if len(answer["results"]) != len(rows):
                raise ServerError(
                    f"server must answer {len(rows)} clips, got {len(answer['results'])}"
                )
            results += answer["results"]
        return results

    def _post(self, route: str, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send a request until it is answered or the time is over."""
        data = json.dumps(body).encode()
        pause = 0.25
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            answer, wait, fault = self._try(route, data, left)
            if answer is not None:
                return answer
            wait = pause * random.uniform(0.5, 1.0) if wait is None else wait
            if time.monotonic() + wait > deadline:
                raise ServerError(
                    f"{self.base_url}{route} gave no answer within {self.timeout_seconds:g} s; "
                    f"the last try: {fault}"
                )
            time.sleep(wait)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _try(
        self, route: str, data: bytes, seconds: float
    ) -> tuple[dict[str, Any] | None, float | None, str]:
        """The answer; or None, how many seconds to wait (None where it was not said), and why."""
        request = urllib.request.Request(self.base_url + route, data, self._headers)
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return json.loads(answer.read()), None, ""
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode("utf-8", "replace")
            if error.code not in TRANSIENT_STATUSES:
                raise ServerError(
                    f"{self.base_url}{route} answered {error.code}: {text}"
                ) from error
            after = error.headers.get("Retry-After", "")
            pause = min(float(after), MAX_PAUSE_SECONDS) if after.isdecimal() else None
            return None, pause, f"{error.code} {text}"
        except (OSError, http.client.HTTPException) as error:
            return None, None, f"{type(error).__name__}: {error}"
        except json.JSONDecodeError as error:
            raise ServerError(f"{self.base_url}{route} must answer in JSON: {error}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _packed(video: Clip, prompt: str, fps: float | None) -> dict[str, Any]:
    """A clip as our schema has it, its frames lossless."""
    from safetensors.torch import save

    frames, rate = open_clip(video, fps)
    if frames.dtype != torch.uint8:
        frames = (frames * 255).round().to(torch.uint8)
    data = save({"frames": frames.cpu().contiguous()})
    return {"safetensors": base64.b64encode(data).decode(), "prompt": prompt, "fps": rate}


def _report(result: dict[str, Any]) -> AnomalyReport | None:
    return None if result["report"] is None else AnomalyReport.from_dict(result["report"])
