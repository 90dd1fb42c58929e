"""A judge behind an OpenAI-compatible server: vLLM, SGLang, LMDeploy, `transformers serve`, ...

Frames go as PNG pictures, each behind its time stamp. Where the server continues a begun answer and
returns log-probabilities, choices are weighed token by token as the local judge does; where it does
not, they are weighed by the votes of sampled answers, and the judge's name says so.

Axes: B conversations, N choices.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import openai
import torch
from PIL import Image
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
from cac_reward.judges.families import find_family
from cac_reward.judges.votes import Votes, count_votes
from cac_reward.questions import TOOL_CALL_END, TOOL_CALL_PREFIX, Message, plain_tool_turn

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

        def write(row: int) -> str:
            more = {"max_tokens": max_new_tokens, "temperature": 0, **_with_tools(tools)}
            answer = self._ask(asked[row], self._beginning(prefixes[row]), more)
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
        if not self._continues:
            return self._count(asked, prefixes, choices, tools)

        def weigh(row: int) -> list[float]:
            return self._weigh(asked[row], prefixes[row], choices, tools)

        lost = [math.nan] * len(choices)
        found = self._each(weigh, len(asked))
        rows = [one if isinstance(one, list) else lost for one in found]
        return torch.tensor(rows).view(-1, len(choices))

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
    ) -> Any:
        """One request, tried again by the client while its failure may pass."""
        extra = {"extra_body": CONTINUE} if beginning else {}
        # The client's types know no plain dictionaries.
        create: Any = self._client.chat.completions.create
        try:
            answer = create(model=self._model, messages=[*messages, *beginning], **more, **extra)
        except json.JSONDecodeError as error:
            raise openai.OpenAIError(f"the server's answer is no JSON: {error}") from error
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
        tools: Sequence[Mapping[str, object]],
    ) -> list[float]:
        """Log-probability of each choice, the sum over its tokens as the server cuts it.

        A token that is not among the likeliest gets the most it can have: no more than the least
        of those, and no more than they leave over.
        """
        more = {"max_tokens": 1, "temperature": 0, "logprobs": True, **_with_tools(tools)}
        more["top_logprobs"] = MAX_TOP_LOG_PROBS
        asked: dict[str, dict[str, float]] = {}
        totals = []
        for choice in choices:
            said, total = "", 0.0
            while said != choice:
                if said not in asked:
                    begun = self._beginning(prefix + said)
                    asked[said] = _top_log_probs(self._ask(messages, begun, more))
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
        tools: Sequence[Mapping[str, object]],
    ) -> Tensor:
        """[B N] log of how many sampled answers make each choice; lost answers have no vote."""
        votes = self.options.votes

        def sample(job: int) -> str:
            row, vote = divmod(job, votes.num_votes)
            more = {"temperature": votes.temperature, "seed": votes.seed + vote}
            answer = self._ask(asked[row], [], {**more, **_with_tools(tools)})
            return message_text(answer.choices[0].message, self.family.call_format)

        texts = self._each(sample, len(asked) * votes.num_votes)
        rows = [torch.empty(0, len(choices))]
        for row, prefix in enumerate(prefixes):
            said = texts[row * votes.num_votes : (row + 1) * votes.num_votes]
            known = [one for one in said if isinstance(one, str)]
            rows.append(count_votes(known, prefix, choices)[None])
        return torch.cat(rows)


def write_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation as the chat API has it; a tool's turn comes from the user, in its tags.

    The API has no pictures in tool turns, and Qwen's own template writes them this way.
    """
    return [_write_message(message) for message in conversation]


def _write_message(message: Message) -> dict[str, Any]:
    if message.role in ("assistant", "system"):
        return {"role": message.role, "content": message.text}
    content = (plain_tool_turn(message) if message.role == "tool" else message).content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, Tensor):
            parts.append({"type": "image_url", "image_url": {"url": picture_url(part)}})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part
        else:
            parts.append({"type": "text", "text": part})
    return {"role": "user", "content": parts}


def picture_url(frame: Tensor) -> str:
    """A frame [C H W] in [0, 1] as the data URL of a lossless PNG, 8 bits a channel."""
    pixels = (frame * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def message_text(message: Any, call_format: str = "json") -> str:
    """What an answer says; a tool call that the server has taken apart is written out again."""
    text = message.content or ""
    for call in message.tool_calls or ():
        name, arguments = call.function.name, call.function.arguments
        body = json.dumps({"name": name, "arguments": "@"}).replace('"@"', arguments)
        if call_format == "xml":
            body = f"<function={name}>\n{_parameters(arguments)}</function>"
        text += f"{TOOL_CALL_PREFIX}\n{body}\n{TOOL_CALL_END}"
    return text


def _parameters(arguments: str) -> str:
    """A call's arguments in tags; what is no JSON object is left for the parser to refuse."""
    try:
        items = json.loads(arguments).items()
    except (json.JSONDecodeError, AttributeError):
        return arguments
    return "".join(
        f"<parameter={name}>\n{json.dumps(value)}\n</parameter>\n" for name, value in items
    )


def _with_tools(tools: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in tools]} if tools else {}


def _top_log_probs(answer: Any) -> dict[str, float]:
    """Token to log-probability of an answer's first token; empty where the server gave none."""
    given = answer.choices[0].logprobs
    if given is None or not given.content or not given.content[0].top_logprobs:
        return {}
    return {one.token: one.logprob for one in given.content[0].top_logprobs}
