"""Counters of the server as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds in seconds of the request histogram."""

_COUNTERS = {
    "requests_total": "Requests by route and status.",
    "clips_total": "Answered clips by status.",
    "batches_total": "Batches judged.",
    "model_restarts_total": "Times the model process was started anew after it died.",
    "decoder_restarts_total": "Times a decoder was started anew after it died.",
    "decode_seconds_total": "Seconds spent decoding.",
    "judge_seconds_total": "Seconds spent judging.",
}
_GAUGES = {
    "queued_clips": "Clips accepted and not answered yet.",
    "pending_bytes": "Bytes of the requests being answered.",
}


class Metrics:
    """Counts that only grow, the present load, and how long requests took."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._buckets = [0] * len(BUCKETS)
        self._seconds = 0.0
        self._requests = 0
        self.queued_clips = 0
        self.pending_bytes = 0

    def add(self, counter: str, amount: float = 1, **labels: str) -> None:
        """Let a counter grow."""
        assert counter in _COUNTERS, counter
        self._counts[counter, tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def value(self, counter: str, **labels: str) -> float:
        """What a counter stands at."""
        return self._counts[counter, tuple(sorted(labels.items()))]

    def observe_request(self, seconds: float) -> None:
        """Note how long a request took."""
        self._seconds += seconds
        self._requests += 1
        for index, bound in enumerate(BUCKETS):
            self._buckets[index] += seconds <= bound

    def render(self) -> str:
        """The page that Prometheus fetches."""
        lines: list[str] = []
        for name, text in _COUNTERS.items():
            lines += _head(name, text, "counter")
            rows = [(labels, n) for (own, labels), n in sorted(self._counts.items()) if own == name]
            lines += [f"cac_reward_{name}{_labels(labels)} {n:.10g}" for labels, n in rows]
        for name, text in _GAUGES.items():
            lines += _head(name, text, "gauge")
            lines.append(f"cac_reward_{name} {getattr(self, name)}")
        name = "request_seconds"
        lines += _head(name, "Seconds from a request's first byte to its answer.", "histogram")
        for bound, count in zip(BUCKETS, self._buckets, strict=True):
            lines.append(f'cac_reward_{name}_bucket{{le="{bound:g}"}} {count}')
        lines.append(f'cac_reward_{name}_bucket{{le="+Inf"}} {self._requests}')
        lines.append(f"cac_reward_{name}_sum {self._seconds:.10g}")
        lines.append(f"cac_reward_{name}_count {self._requests}")
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP cac_reward_{name} {text}", f"# TYPE cac_reward_{name} {kind}"]


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    """Routes and states are names of ours: nothing in them needs escaping."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
