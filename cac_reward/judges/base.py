"""What the scorer asks of a judge: to write an answer, or to weigh given answers.

Axes: B conversations, N choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from cac_reward.calibration import Calibration
from cac_reward.frames import JudgeSettings
from cac_reward.judges.families import FAMILIES, Family
from cac_reward.questions import INSPECT_TOOL, Message

Conversation = Sequence[Message]


class JudgeUnreachableError(RuntimeError):
    """A judge elsewhere answers nobody, or refuses key, address or model."""


class NoAnswer(str):
    """Stands where a judge elsewhere gave no answer: an empty text with the reason."""

    reason: str

    def __new__(cls, reason: str) -> NoAnswer:
        empty = super().__new__(cls, "")
        empty.reason = reason
        return empty


class AbstractJudge(ABC):
    """A vision-language model that answers conversations made of text and frames."""

    judge_id: str
    """Folder or hub id, as the user gave it."""
    revision: str | None
    """Commit of the weights where they came from a hub."""
    patch_factor: int
    """Both sides of every frame must be a multiple of this many pixels."""
    settings: JudgeSettings
    """How the judge wants to be asked."""
    family: Family = FAMILIES["qwen3_vl"]
    """How it writes boxes and tool calls."""
    decoder: str = "greedy"
    """How its answers are chosen; greedy unless votes decide."""
    attention: str | None = None
    """The attention kernel it runs on, where that is known."""
    quantization: str | None = None
    """How coarse its weights were loaded, where they were not loaded as they are."""
    fingerprint: str = ""
    """Changes with the judge's files and with how they are run; for finding reports again."""
    calibration: Calibration = Calibration()
    """How its verdicts are read."""

    @property
    def name(self) -> str:
        """What goes into reports: the id, with the revision where there is one."""
        return self.judge_id if self.revision is None else f"{self.judge_id}@{self.revision}"

    @property
    def plain_settings(self) -> dict[str, object]:
        """What its answers depend on besides weights, decoder and clip; plain values by name."""
        plain: dict[str, object] = {"family": self.family.name, "quantization": self.quantization}
        for name, value in asdict(self.settings).items():
            parts = value if isinstance(value, dict) else {"": value}
            plain |= {f"{name}.{key}".rstrip("."): one for key, one in parts.items()}
        return plain

    @property
    def tools(self) -> list[dict[str, object]]:
        """What the judge is told it may call; one trained on the protocol knows its only tool."""
        return [INSPECT_TOOL] if self.settings.wording == "full" else []

    @property
    def domain_note(self) -> str | None:
        """What a reader must know about a judge trained for one kind of footage only."""
        if self.settings.domain is None:
            return None
        return (
            f"This judge was trained on footage of the domain {self.settings.domain!r} only; "
            "on other footage its verdict means nothing."
        )

    @abstractmethod
    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[str]:
        """Let the judge write the next assistant turn of each conversation, greedily.

        Args:
            conversations: B of them, each ending in a turn of the user or a tool.
            max_new_tokens: most tokens written after the prefix, at least 1.
            prefix: how the answer begins; one for all or one each.
            tools: JSON schemas of the tools that the judge may call.

        Returns:
            B answers, the prefix included; a judge elsewhere may give a `NoAnswer`.
        """

    @abstractmethod
    def choice_log_probs(
        self,
        conversations: Sequence[Conversation],
        *,
        choices: Sequence[str],
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> Tensor:
        """Weigh given continuations of the next assistant turn of each conversation.

        Args:
            conversations: B of them, each ending in a turn of the user or a tool.
            choices: N texts, each a possible continuation of `prefix`.
            prefix: how the answer begins; one for all or one each.
            tools: JSON schemas of the tools that the judge may call.

        Returns:
            [B N] float32, the sum of the token log-probabilities of each choice; no gradient.
            A judge elsewhere may give NaN for a whole conversation.
        """

    def probabilities(self, log_probs: Tensor) -> Tensor:
        """Share of each choice among the choices: softmax over N of log_probs [B N].

        Raises:
            RuntimeError: If a number is not finite.
        """
        if not log_probs.isfinite().all():
            raise RuntimeError(
                f"judge {self.name} must give finite log-probabilities, got {log_probs.tolist()}; "
                "its weights are damaged or its dtype overflows (try float32 or bfloat16)"
            )
        return torch.softmax(log_probs, dim=-1)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside this context a judge may keep what it has read, to go on from there."""
        yield


def one_prefix_each(prefix: str | Sequence[str], count: int) -> list[str]:
    """The prefix of each of `count` conversations.

    Raises:
        ValueError: If there are several prefixes, but not one for each conversation.
    """
    if isinstance(prefix, str):
        return [prefix] * count
    if len(prefix) != count:
        raise ValueError(
            f"prefix must be one text or one for each of {count} conversations, got {len(prefix)}"
        )
    return list(prefix)


def check_conversations(conversations: Sequence[Conversation]) -> None:
    """Refuse conversations that leave nothing for the judge to answer.

    Raises:
        ValueError: If one is empty or ends in a turn of the judge or the system.
    """
    for conversation in conversations:
        last = conversation[-1].role if conversation else "nothing"
        if last not in ("user", "tool"):
            raise ValueError(
                f"conversations must end in a turn of the user or a tool, got one ending in {last}"
            )
