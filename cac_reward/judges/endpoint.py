"""A judge behind an OpenAI-compatible server: vLLM, SGLang, LMDeploy, `transformers serve`, ...

Frames go as PNG pictures, each behind its time stamp. Where the server continues a begun answer and
returns log-probabilities, choices are weighed token by token as the local judge does; where it does
not, they are weighed by the votes of sampled answers, and the judge's name says so.

Axes: B conversations, N choices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import openai
import torch
from torch import Tensor

from cac_reward.frames import JudgeSettings
from cac_reward.judges.base import (
    AbstractJudge,
    Conversation,
    JudgeUnreachableError,
    NoAnswer,
    check_conversations,
    one_prefix_each,
)
from cac_reward.judges.chat_messages import message_text, write_messages
from cac_reward.judges.families import find_family
from cac_reward.judges.tokens import TokenMeter, current_meter
from cac_reward.judges.votes import Votes, count_votes

logger = logging.getLogger(__name__)

PROBABILITIES = ("auto", "log_probs", "votes")
MAX_TOP_LOG_PROBS = 20
KEY_VARIABLE = "OPENAI_API_KEY"
# vLLM and SGLang go on with the assistant's last turn when told so.
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """How a server is asked."""

    probabilities: str = "auto"
    """'log_probs', 'votes', or 'auto': log-probabilities if a first small question gets some."""
    num_votes: int = 8
    """Sampled answers per question where votes decide, at least 2."""
    temperature: float = 1.0
    """Of sampled answers, above 0."""
    seed: int = 0
    """Of sampled answers; vote i has seed + i."""
    concurrency: int = 8
    """Requests under way at once, at least 1."""
    timeout_seconds: float = 120.0
    """Of one try, above 0."""
    max_retries: int = 4
    """More tries after what may pass (no connection, time-out, 408, 409, 429, 5xx), at least 0;
    the pauses between them double, or are as long as the server asks."""
    family: str = "qwen3_vl"
    """Of the model, one of `families.FAMILIES`: how it writes boxes and tool calls."""
    patch_factor: int | None = None
    """Sides of frames are multiples of this: patch times merge size; None for the family's."""

    def __post_init__(self) -> None:
        if self.probabilities not in PROBABILITIES:
            raise ValueError(
                f"probabilities must be one of {PROBABILITIES}, got {self.probabilities!r}"
            )
        for name, least in (("concurrency", 1), ("max_retries", 0), ("patch_factor", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")
        find_family(self.family)
        _ = self.votes  # Checks itself.

    @property
    def votes(self) -> Votes:
        return Votes(num_votes=self.num_votes, temperature=self.temperature, seed=self.seed)


class EndpointJudge(AbstractJudge):
    """A chat model elsewhere as a judge; greedy where it writes.

    A clip whose request fails for good gets no answer and hence no score; a wrong address, key or
    model is an error at once.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: the server's name of the model.
        options: how to ask.
        settings: how the judge wants to be asked.
        api_key: None takes it from the environment variable OPENAI_API_KEY, where there is one.

    Raises:
        JudgeUnreachableError: The server cannot be reached, or refuses key or model.
    """

    revision = None

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        options: EndpointOptions | None = None,
        settings: JudgeSettings | None = None,
        api_key: str | None = None,
    ) -> None:
        self.options = options or EndpointOptions()
        self.settings = settings or JudgeSettings()
        self.family = find_family(self.options.family)
        self.patch_factor = self.options.patch_factor or self.family.factor
        self._base_url, self._model = base_url.rstrip("/"), model
        self._client = openai.OpenAI(
            base_url=self._base_url,
            # Servers without a key still want the header.
            api_key=api_key or os.environ.get(KEY_VARIABLE) or "none",
            timeout=self.options.timeout_seconds,
            max_retries=self.options.max_retries,
        )
        wanted = self.options.probabilities
        self.probabilities_from = self._probe() if wanted == "auto" else wanted
        self.judge_id = f"{model} at {self._base_url}"
        if self.probabilities_from == "votes":
            self.judge_id += f" (share of {self.options.num_votes} votes)"
            self.decoder = self.options.votes.decoder
            logger.warning(
                "%s: verdicts are shares of votes, since the server returns no "
                "log-probabilities of continued answers (or votes were asked for)",
                self.judge_id,
            )
        asked = [self.judge_id, asdict(self.options), asdict(self.settings)]
        self.fingerprint = hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[str]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_conversations(conversations)
        prefixes = one_prefix_each(prefix, len(conversations))
        asked = [write_messages(one) for one in conversations]
        meter = current_meter(len(asked))

        def write(row: int) -> str:
            more = {"max_tokens": max_new_tokens, "temperature": 0, **_with_tools(tools)}
            spent = partial(_note_usage, meter, row)
            answer = self._ask(asked[row], self._beginning(prefixes[row]), more, spent)
            text = message_text(answer.choices[0].message, self.family.call_format)
            return prefixes[row] + text if self._continues else text

        return [
            NoAnswer(str(one)) if isinstance(one, openai.OpenAIError) else one
            for one in self._each(write, len(conversations))
        ]

    def choice_log_probs(
        self,
        conversations: Sequence[Conversation],
        *,
        choices: Sequence[str],
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> Tensor:
        """As in the base class; NaN for a conversation that the server did not answer."""
        check_conversations(conversations)
        prefixes = one_prefix_each(prefix, len(conversations))
        asked = [write_messages(one) for one in conversations]
        meter = current_meter(len(asked))
        more = _with_tools(tools)
        if not self._continues:
            return self._count(asked, prefixes, choices, more, meter)

        def weigh(row: int) -> list[float]:
            spent = partial(_note_usage, meter, row)
            return self._weigh(asked[row], prefixes[row], choices, more, spent)

        log_probs = torch.full((len(asked), len(choices)), math.nan)
        for row, found in enumerate(self._each(weigh, len(asked))):
            if isinstance(found, list):
                log_probs[row] = torch.tensor(found)
            else:
                meter.lose(row)
        return log_probs

    def probabilities(self, log_probs: Tensor) -> Tensor:
        """Share of each choice among the choices, NaN where there was no answer."""
        return torch.softmax(log_probs, dim=-1)

    @property
    def _continues(self) -> bool:
        """Whether the server goes on with an answer that has begun."""
        return self.probabilities_from == "log_probs"

    def _beginning(self, prefix: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": prefix}] if prefix and self._continues else []

    def _ask(
        self,
        messages: list[dict[str, Any]],
        beginning: list[dict[str, Any]],
        more: Mapping[str, Any],
        spent: Callable[[Any], None] = lambda _: None,
    ) -> Any:
        """One request, tried again by the client while its failure may pass; `spent` sees it."""
        extra = {"extra_body": CONTINUE} if beginning else {}
        # The client's types know no plain dictionaries.
        create: Any = self._client.chat.completions.create
        try:
            answer = create(model=self._model, messages=[*messages, *beginning], **more, **extra)
        except json.JSONDecodeError as error:
            raise openai.OpenAIError(f"the server's answer is no JSON: {error}") from error
        spent(answer)
        if not answer.choices:
            raise openai.OpenAIError("the server's answer holds no choice")
        return answer

    def _each(
        self, work: Callable[[int], _Result], count: int
    ) -> list[_Result | openai.OpenAIError]:
        """Do all jobs side by side; what only one clip failed at stands in its place.

        Raises:
            JudgeUnreachableError: The server refuses key, address or model, or answers nobody.
        """

        def attempt(job: int) -> _Result | openai.OpenAIError:
            try:
                return work(job)
            except (
                openai.AuthenticationError,
                openai.PermissionDeniedError,
                openai.NotFoundError,
            ) as error:
                raise JudgeUnreachableError(self._complaint(error)) from error
            except openai.OpenAIError as error:
                logger.warning("%s gave no answer: %s", self.judge_id, error)
                return error

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            results = list(pool.map(attempt, range(count)))
        lost = [one for one in results if isinstance(one, openai.APIConnectionError)]
        if results and len(lost) == len(results):
            raise JudgeUnreachableError(self._complaint(lost[0])) from lost[0]
        return results

    def _complaint(self, error: Exception) -> str:
        return (
            f"endpoint {self._base_url} must answer for the model {self._model!r}, got: {error}; "
            f"check address, model and key (api_key or {KEY_VARIABLE}), or raise timeout_seconds"
        )

    def _probe(self) -> str:
        """Where this server's probabilities can come from."""
        begun = [{"role": "assistant", "content": "Ye"}]
        more = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        try:
            answer = self._ask([{"role": "user", "content": "Say: Yes"}], begun, more)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return "votes"
        except openai.OpenAIError as error:
            raise JudgeUnreachableError(self._complaint(error)) from error
        return "log_probs" if _top_log_probs(answer) else "votes"

    def _weigh(
        self,
        messages: list[dict[str, Any]],
        prefix: str,
        choices: Sequence[str],
        more: Mapping[str, Any],
        spent: Callable[[Any], None],
    ) -> list[float]:
        """Log-probability of each choice, the sum over its tokens as the server cuts it.

        A token that is not among the likeliest gets the most it can have: no more than the least
        of those, and no more than they leave over.
        """
        one = {"max_tokens": 1, "temperature": 0, "logprobs": True, **more}
        one["top_logprobs"] = MAX_TOP_LOG_PROBS
        asked: dict[str, dict[str, float]] = {}
        totals = []
        for choice in choices:
            said, total = "", 0.0
            while said != choice:
                if said not in asked:
                    begun = self._beginning(prefix + said)
                    asked[said] = _top_log_probs(self._ask(messages, begun, one, spent))
                top = asked[said]
                rest = choice.removeprefix(said)
                fitting = [token for token in top if token and rest.startswith(token)]
                if not fitting:
                    left = max(1 - sum(map(math.exp, top.values())), 1e-12)
                    total += min(math.log(left), *top.values())
                    break
                token = max(fitting, key=len)
                said, total = said + token, total + top[token]
            totals.append(total)
        return totals

    def _count(
        self,
        asked: Sequence[list[dict[str, Any]]],
        prefixes: Sequence[str],
        choices: Sequence[str],
        more: Mapping[str, Any],
        meter: TokenMeter,
    ) -> Tensor:
        """[B N] log of how many sampled answers make each choice; lost answers have no vote."""
        votes = self.options.votes

        def sample(job: int) -> str:
            row, vote = divmod(job, votes.num_votes)
            dice = {"temperature": votes.temperature, "seed": votes.seed + vote}
            spent = partial(_note_usage, meter, row)
            answer = self._ask(asked[row], [], {**dice, **more}, spent)
            return message_text(answer.choices[0].message, self.family.call_format)

        texts = self._each(sample, len(asked) * votes.num_votes)
        rows = [torch.empty(0, len(choices))]
        for row, prefix in enumerate(prefixes):
            said = texts[row * votes.num_votes : (row + 1) * votes.num_votes]
            known = [one for one in said if isinstance(one, str)]
            if len(known) < len(said):
                meter.lose(row)
            rows.append(count_votes(known, prefix, choices)[None])
        return torch.cat(rows)


def _with_tools(tools: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in tools]} if tools else {}


def _note_usage(meter: TokenMeter, row: int, answer: Any) -> None:
    """Add what the server says that a request cost; some servers say nothing."""
    read = getattr(answer.usage, "prompt_tokens", None)
    written = getattr(answer.usage, "completion_tokens", None)
    if isinstance(read, int) and isinstance(written, int):
        meter.add(row, read=read, written=written)
    else:
        meter.lose(row)


def _top_log_probs(answer: Any) -> dict[str, float]:
    """Token to log-probability of an answer's first token; empty where the server gave none."""
    given = answer.choices[0].logprobs
    if given is None or not given.content or not given.content[0].top_logprobs:
        return {}
    return {one.token: one.logprob for one in given.content[0].top_logprobs}
