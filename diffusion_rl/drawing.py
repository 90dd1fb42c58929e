"""The videos of one update after another, drawn and sent to the rewards; ahead of time if asked.

With staleness the videos of update n + 1 are drawn, by the policy that update n begins with, while
rewards elsewhere judge those of update n:

    draw n + 1 | wait for the scores of n | send n + 1 | update n | draw n + 2 | ...

Only how the next videos were drawn is kept with a run's state; a resumed run draws them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_rl.collect import Batch, collect
from diffusion_rl.full_policies import AbstractPolicies
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.lora import TRAINED
from diffusion_rl.policies import policies_of
from diffusion_rl.processes import together
from diffusion_rl.progress import FinetuneSettings, FinetuneState
from diffusion_rl.prompt_sampling import choose_informative, choose_prompts
from diffusion_rl.rewards import AskedRewards, Reward, ask_for_team


class Drawn(NamedTuple):
    """An update's videos, and who drew them."""

    batch: Batch
    """The videos."""
    policy_step: int
    """Updates that the policy had made."""


class Draws:
    """What the loop takes its videos from.

    Args:
        generator: with what learns attached.
        embeddings: of the prompts.
        rewards: asked about each batch.
        prompts: their texts.
        settings: of the run.
        state: of the run; `ahead` is kept up to date here.
    """

    def __init__(
        self,
        generator: AbstractVideoGenerator,
        embeddings: PromptEmbeddings,
        rewards: Sequence[Reward],
        prompts: Sequence[str],
        settings: FinetuneSettings,
        state: FinetuneState,
    ) -> None:
        self._generator, self._embeddings = generator, embeddings
        self._rewards, self._prompts = rewards, prompts
        self._settings, self._state = settings, state
        self._next: Drawn | None = None
        self._asked: AskedRewards | None = None

    def take(self) -> tuple[Drawn, AskedRewards | None]:
        """The videos of the next update, with the rewards at work on them; see `ask_for_team`."""
        step = self._state.step + 1
        drawn = self._next or self._begin(step)
        asked = self._asked or self._ask(drawn)
        self._next = self._asked = None
        if self._settings.staleness:
            self._draw_ahead(step + 1)
        return drawn, asked

    def send_next(self) -> None:
        """Ask the rewards about the videos that were drawn ahead, if any were."""
        if self._next is not None:
            self._asked = self._ask(self._next)

    def _begin(self, step: int) -> Drawn:
        """The videos of an update that were not drawn ahead in this process."""
        ahead = self._state.ahead
        if not ahead:
            return Drawn(self._collect(step, self._choose(step)), self._state.step)
        policies = policies_of(self._generator.transformer)
        with acting_as(policies, ahead["policy"]):
            batch = self._collect(step, torch.tensor(ahead["prompts"]))
        return Drawn(batch, ahead["policy_step"])

    def _draw_ahead(self, step: int) -> None:
        """Draw an update's videos with the policy as it is, and note how.

        A run's last update notes it, too, so that the run may be made longer.
        """
        chosen = self._choose(step)
        self._state.ahead = {
            "policy": policies_of(self._generator.transformer).state(TRAINED),
            "prompts": chosen.tolist(),
            "policy_step": self._state.step,
        }
        if step <= self._settings.updates:
            self._next = Drawn(self._collect(step, chosen), self._state.step)

    def _choose(self, step: int) -> Tensor:
        own, count = self._settings.prompt_sampling, len(self._embeddings)
        wanted = (count, self._settings.rollout.prompts_per_update, self._settings.seed, step)
        if own.name == "uniform":
            return choose_prompts(*wanted)
        return choose_informative(*wanted, self._state.prompts, own.floor)

    def _collect(self, step: int, chosen: Tensor) -> Batch:
        generator, settings = self._generator, self._settings
        with together("drawing videos"):
            batch = collect(generator, self._embeddings, settings, step=step, prompts=chosen)
            check_finite(batch.trajectory.videos, step)
        return batch

    def _ask(self, drawn: Drawn) -> AskedRewards | None:
        trajectory = drawn.batch.trajectory
        texts = [self._prompts[index] for index in trajectory.prompt_index.tolist()]
        with together("sending videos to rewards"):
            return ask_for_team(self._rewards, trajectory.videos, texts, fps=self._generator.fps)


def check_finite(videos: Tensor, step: int) -> None:
    """Refuse videos [B F C H W] of an update that no reward could judge.

    Raises:
        ValueError: says whose fault it is and what to change.
    """
    broken = int((~videos.isfinite()).flatten(1).any(dim=1).sum())
    if not broken:
        return
    remedy = (
        "the generator overflows by itself: set generator.dtype=float32 or bfloat16"
        if step == 1
        else f"the policy of update {step - 1} has diverged: delete the newest checkpoints and go "
        "on with a lower optimizer.learning_rate"
    )
    raise ValueError(
        f"videos of update {step} must be finite, got NaN or infinity in {broken} of "
        f"{len(videos)}; {remedy}"
    )


@contextmanager
def acting_as(policies: AbstractPolicies, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The trained policy with other weights for a while; its own are put back exactly."""
    own = policies.state(TRAINED)
    policies.set_state(weights, TRAINED, "checkpoint")
    try:
        yield
    finally:
        policies.set_state(own, TRAINED, "checkpoint")
