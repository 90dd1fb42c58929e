"""Questions to a server with the chat API: within a budget, and until an answer may be kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import openai

from cac_reward.data.teaching.lessons import Answer, Question
from cac_reward.data.teaching.settings import TeachLimits, TeachSettings
from cac_reward.data.teaching.verifying import RejectedAnswerError, read_json_answer
from cac_reward.data.teaching.wording import AGAIN_TEXT
from cac_reward.judges.base import JudgeUnreachableError
from cac_reward.judges.chat_messages import write_messages

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_PAUSE_SECONDS = 600.0
"""Longest wait that a server may ask for."""
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_OWN_PAUSE = 16.0
_QUOTED_CHARACTERS = 8000
_REFUSALS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_PASSING_STATUSES = (408, 409, 429)
# What servers answer to a field that they do not know.
_BAD_REQUEST = (openai.BadRequestError, openai.UnprocessableEntityError)


class HaltedError(RuntimeError):
    """The run is being stopped; nothing more is asked."""


class UnansweredError(RuntimeError):
    """A question has no usable answer."""


@dataclass
class Tally:
    """What a run has cost and brought so far."""

    requests: int = 0
    """Sent, whatever came of them."""
    repeated: int = 0
    """Of those, sent again after a failure that may pass."""
    accepted: int = 0
    """Answers kept."""
    rejected: int = 0
    """Answers not kept."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected answers by rule; one answer may break several."""
    read_tokens: int = 0
    """Of questions, as the server counts."""
    written_tokens: int = 0
    """Of answers, as the server counts."""
    uncounted: int = 0
    """Answers whose tokens the server does not tell."""

    @property
    def tokens(self) -> int:
        return self.read_tokens + self.written_tokens


class Teacher:
    """A chat model elsewhere; may be asked by many threads at once.

    Args:
        base_url: such as http://127.0.0.1:8000/v1. The key comes from the environment variable
            OPENAI_API_KEY, where there is one.
        settings: What is asked.
        limits: How far a run may go.
    """

    def __init__(self, base_url: str, settings: TeachSettings, limits: TeachLimits) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must begin with http:// or https://, got {base_url!r}")
        self.base_url, self.settings, self.limits = base_url.rstrip("/"), settings, limits
        self.tally = Tally()
        self.halted: str | None = None
        """Why nothing more is asked; None while it is."""
        self._takes_schema = {"auto": None, "always": True, "never": False}[limits.schema]
        # A signal's handler may halt while the main thread does.
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._client = openai.OpenAI(
            base_url=self.base_url,
            # Servers without a key still want the header.
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            timeout=limits.timeout_seconds,
            # Every request is counted, so none is sent again behind our back.
            max_retries=0,
        )

    @property
    def takes_schema(self) -> bool | None:
        """Whether the form goes along with questions; None while that is not known."""
        return self._takes_schema

    def halt(self, reason: str) -> None:
        """Begin no more requests; those under way may end."""
        with self._lock:
            self.halted = self.halted or reason
        self._stop.set()

    def ask(self, question: Question, name: str) -> Answer:
        """The first answer that may be kept.

        After an answer that may not, the teacher is shown it and told every reason.

        Args:
            question: What is asked.
            name: of the clip, for seeds.

        Raises:
            UnansweredError: If no try brought one, or a request failed for good.
            HaltedError: If the run is being stopped or its budget is spent.
            JudgeUnreachableError: If the server refuses key, address or model, or is not there.
        """
        asked = write_messages(question.messages)
        again: list[dict[str, Any]] = []
        for number in range(1, self.limits.tries + 1):
            more = self._more(f"{name}\0{question.step}\0{number}")
            choice = self._request([*asked, *again], question.schema, more)
            text = _text(choice)
            try:
                answer = _read(choice, text, question)
            except RejectedAnswerError as error:
                last = error
                with self._lock:
                    self.tally.rejected += 1
                    self.tally.reasons.update({rule for rule, _ in error.reasons})
                again = _told(text, error) if text.strip() else []
                continue
            with self._lock:
                self.tally.accepted += 1
            return answer
        raise UnansweredError(
            f"{question.step}: none of {self.limits.tries} answers could be kept, the last for: "
            f"{str(last)[:400]}"
        )

    def _more(self, place: str) -> dict[str, Any]:
        """The rest of a request."""
        settings = self.settings
        dice = hashlib.sha256(f"{settings.seed}\0{place}".encode("utf-8", "replace")).digest()
        more: dict[str, Any] = {
            "max_tokens": settings.answer_tokens,
            "seed": int.from_bytes(dice[:4], "big") >> 1,
        }
        if settings.temperature is not None:
            more["temperature"] = settings.temperature
        more.update(settings.body)
        return {key: value for key, value in more.items() if value is not None}

    def _request(
        self, messages: list[dict[str, Any]], schema: Mapping[str, Any], more: Mapping[str, Any]
    ) -> Any:
        """One choice, asked for again while a failure may pass."""
        failures = 0
        with_schema = self._takes_schema is not False
        while True:
            self._spend(again=failures > 0)
            try:
                choice = self._send(messages, schema if with_schema else None, more)
            except _REFUSALS as error:
                raise self._unreachable(error) from error
            except openai.OpenAIError as error:
                if with_schema and self._takes_schema is None and isinstance(error, _BAD_REQUEST):
                    with_schema = False
                    continue
                pause = _pause(error, failures)
                if pause is None or failures == self.limits.retries:
                    raise self._failure(error) from error
                failures += 1
                if self._stop.wait(pause):
                    raise HaltedError(self.halted) from error
            else:
                if self.limits.schema == "auto":
                    self._takes_schema = with_schema
                return choice

    def _spend(self, *, again: bool) -> None:
        """Take one request out of the budget."""
        spent = None
        with self._lock:
            if self.halted is None:
                for name, used in (
                    ("max_requests", self.tally.requests),
                    ("max_tokens", self.tally.tokens),
                ):
                    most = getattr(self.limits, name)
                    if most is not None and used >= most:
                        spent = f"{name}={most} is reached"
            if self.halted is None and spent is None:
                self.tally.requests += 1
                self.tally.repeated += again
                return
        if spent is not None:
            self.halt(spent)
        raise HaltedError(self.halted)

    def _send(
        self, messages: list[dict[str, Any]], schema: Mapping[str, Any] | None, more: Any
    ) -> Any:
        form = {"name": "answer", "strict": True, "schema": schema}
        body = dict(more)
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        # The client's types know no plain dictionaries, nor the names that servers have added.
        create: Any = self._client.chat.completions.create
        try:
            answer = create(model=self.settings.model, messages=messages, extra_body=body)
        except json.JSONDecodeError as error:
            raise openai.OpenAIError(f"the server's answer is no JSON: {error}") from error
        self._note_tokens(getattr(answer, "usage", None))
        choices = getattr(answer, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise openai.OpenAIError("the server's answer holds no choice")
        return choices[0]

    def _note_tokens(self, usage: Any) -> None:
        read = getattr(usage, "prompt_tokens", None)
        written = getattr(usage, "completion_tokens", None)
        counted = isinstance(read, int) and isinstance(written, int)
        with self._lock:
            if isinstance(read, int) and isinstance(written, int):
                self.tally.read_tokens += read
                self.tally.written_tokens += written
            else:
                self.tally.uncounted += 1
        if not counted and self.limits.max_tokens is not None:
            self.halt("max_tokens needs a server that counts them, and this one gives no usage")

    def _failure(self, error: openai.OpenAIError) -> Exception:
        """What a request that failed for good means: for the clip, or for the run."""
        timed_out = isinstance(error, openai.APITimeoutError)
        absent = isinstance(error, openai.APIConnectionError) and not timed_out
        if absent and not self.tally.accepted + self.tally.rejected:
            return self._unreachable(error)
        return UnansweredError(f"the request failed: {str(error)[:400]}")

    def _unreachable(self, error: Exception) -> JudgeUnreachableError:
        """What ends the run, before another request is begun in vain."""
        self.halt("the server answers nobody")
        return JudgeUnreachableError(
            f"endpoint {self.base_url} must answer for the model {self.settings.model!r}, got: "
            f"{error}; check address, model and key ({KEY_VARIABLE})"
        )


def _pause(error: openai.OpenAIError, failures: int) -> float | None:
    """Seconds after which a request may be sent again; None for never."""
    own = min(_FIRST_PAUSE_SECONDS * 2**failures, _LONGEST_OWN_PAUSE)
    if not isinstance(error, openai.APIStatusError):
        return own
    if error.status_code not in _PASSING_STATUSES and error.status_code < 500:
        return None
    try:
        asked = float(error.response.headers.get("retry-after", own))
    except ValueError:
        return own
    if not math.isfinite(asked) or asked > MAX_PAUSE_SECONDS:
        return None
    return max(asked, 0.0)


def _text(choice: Any) -> str:
    content = choice.message.content
    return content if isinstance(content, str) else ""


def _read(choice: Any, text: str, question: Question) -> Answer:
    """An answer that may be kept."""
    refusal = getattr(choice.message, "refusal", None)
    if refusal or choice.finish_reason == "content_filter":
        why = f"the teacher refused: {str(refusal or choice.finish_reason)[:200]}"
        raise RejectedAnswerError([("refused", why)])
    if choice.finish_reason == "length":
        raise RejectedAnswerError([("cut", "the answer must be shorter; it was cut off")])
    answer = read_json_answer(text, question.schema)
    question.check(answer)
    return answer


def _told(text: str, error: RejectedAnswerError) -> list[dict[str, Any]]:
    """The turns that hold what was said and why it cannot be used."""
    reasons = "\n".join(f"- {why}" for _, why in error.reasons)
    return [
        {"role": "assistant", "content": text[:_QUOTED_CHARACTERS]},
        {"role": "user", "content": AGAIN_TEXT.format(reasons=reasons)},
    ]
