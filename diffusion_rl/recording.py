"""What a rollout keeps of its stochastic steps, which each video may take at places of its own.

Axes: B videos, K denoising steps, S stochastic ones of each video, latents [B C T H W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_rl.gaussian_steps import Transition
from diffusion_rl.transitions import TransitionFunction, ode


def steps_of_each(stochastic: Sequence[int] | Tensor, count: int, num_steps: int) -> Tensor:
    """Places [S count] long of every video's stochastic steps, ascending.

    Args:
        stochastic: S places for all videos, or [S count] long.
        count: videos.
        num_steps: of the schedule.

    Raises:
        ValueError: there are places for another number of videos, a video has one twice, or there
            is no such step.
    """
    steps = torch.as_tensor(stochastic, dtype=torch.long)
    steps = steps[:, None].expand(-1, count) if steps.ndim == 1 else steps
    if steps.shape[1] != count:
        raise ValueError(
            f"stochastic must be places for all videos or [S {count}], got shape "
            f"{tuple(steps.shape)}"
        )
    steps = steps.sort(dim=0).values
    if bool(((steps < 0) | (steps >= num_steps)).any()):
        raise ValueError(
            f"stochastic must be places in [0, {num_steps}), got {steps.min()} to {steps.max()}"
        )
    if bool((steps[1:] == steps[:-1]).any()):
        raise ValueError("stochastic must name a step of a video once, got one twice")
    return steps


def highest_sigma(sigmas: Tensor) -> Tensor:
    """Second level of a schedule [K+1]; half the first where a schedule has one step only."""
    return sigmas[1] if len(sigmas) > 2 else sigmas[0] / 2


class Recording:
    """Takes the steps of B videos and keeps those that explore.

    Args:
        steps: [S B] long, ascending: where each video explores.
        sources: B, of each video's noise.
        transition: of the steps that explore; others are `ode`.
        noise_level: of the same.
        keep: False keeps nothing of them, where nothing is learnt from.
    """

    def __init__(
        self,
        steps: Tensor,
        sources: Sequence[torch.Generator],
        transition: TransitionFunction,
        noise_level: float,
        *,
        keep: bool = True,
    ) -> None:
        self._exploring = steps
        self.steps = steps if keep else steps[:0]
        self._sources = sources
        self._transition, self._noise_level = transition, noise_level
        self._taken: list[tuple[Tensor, Tensor, Tensor, Transition]] = []

    def take(self, step: int, sigmas: Tensor, latent: Tensor, prediction: Tensor) -> Tensor:
        """The latents after a step.

        Args:
            step: its place.
            sigmas: [K+1] the schedule.
            latent: [B C T H W], or [U C T H W] as long as no video explores.
            prediction: alike, the velocities.
        """
        own = (self._exploring == step).any(dim=0).nonzero().flatten()
        levels, highest = (sigmas[step], sigmas[step + 1]), highest_sigma(sigmas)
        if not len(own):
            return ode(latent, prediction, *levels, noise_level=0.0, sigma_max=highest).next_latent
        at = own.to(latent.device)
        before = latent[at]
        result = self._transition(
            *(before, prediction[at], *levels),
            noise_level=self._noise_level,
            sigma_max=highest,
            generator=[self._sources[place] for place in own.tolist()],
        )
        if len(self.steps):
            slots = (self.steps[:, own] < step).sum(dim=0)
            self._taken.append((slots, own, before, result))
        if len(own) == len(latent):
            return result.next_latent
        plain = ode(latent, prediction, *levels, noise_level=0.0, sigma_max=highest).next_latent
        return plain.index_copy(0, at, result.next_latent)

    def latents(self, like: Tensor) -> Tensor:
        """[S B C T H W] before each step; `like` [B C T H W] says how large that is."""
        return self._put_together([latent for *_, latent, _ in self._taken], like)

    def next_latents(self, like: Tensor) -> Tensor:
        """[S B C T H W] after it."""
        return self._put_together([one.next_latent for *_, one in self._taken], like)

    def means(self, like: Tensor) -> Tensor:
        """[S B C T H W] centre of its Gaussian."""
        return self._put_together([one.mean for *_, one in self._taken], like)

    def log_probs(self, like: Tensor) -> Tensor:
        """[B S] of it."""
        found = [one.log_prob for *_, one in self._taken]
        return self._put_together(found, like[:, 0, 0, 0, 0]).T

    def log_prob_maps(self, like: Tensor) -> Tensor:
        """[B S T H W] the same at each latent position."""
        found = [one.log_prob_map for *_, one in self._taken]
        return self._put_together(found, like[:, 0]).transpose(0, 1)

    def _put_together(self, found: Sequence[Tensor], like: Tensor) -> Tensor:
        whole = like.new_empty((len(self.steps), *like.shape))
        for (slots, own, *_), one in zip(self._taken, found, strict=True):
            whole[slots.to(like.device), own.to(like.device)] = one
        return whole
