"""Prompts and seeds to videos, with what the update needs recorded on the way.

Axes: N prompts, B videos, K denoising steps, S stochastic ones among them,
latents [B C T H W], videos [B F C H W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion_rl.gaussian_steps import Transition
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.memory_errors import explain_out_of_memory
from diffusion_rl.out_of_memory import drawing_savings
from diffusion_rl.recording import Recording, highest_sigma, steps_of_each
from diffusion_rl.sharding import in_step
from diffusion_rl.shares import Share, chunks, whole
from diffusion_rl.transitions import TransitionFunction, flow_sde

OUTCOMES = ("drawn", "implied")
STEPS_OF = ("update", "group")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How videos are drawn while training."""

    num_inference_steps: int = 10
    """Denoising steps of a video, at least 1."""
    stochastic_steps: int = 3
    """Steps of a video that explore and learn, drawn at random among `eligible_steps`."""
    steps_of: str = "update"
    """Whether an `update` draws them once for all its videos, or each `group` its own, so that an
    update learns at more noise levels."""
    eligible_steps: int | None = None
    """The first so many steps may be stochastic; None means all but the last, which would leave
    its noise in the video."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, at least 1; 1 means none."""
    train_guidance: float | None = None
    """Guidance of the prediction that learns, at least 1; None is guidance_scale. Recorded steps
    can only be replayed with the same; noised videos may learn at 1, the conditional alone."""
    noise_level: float = 0.7
    """How much a stochastic step explores; above 0, and at most 1 with transitions cps and ddim."""
    prompts_per_update: int = 8
    """Groups in an update, at least 1."""
    videos_per_prompt: int = 8
    """Videos in a group, at least 2."""
    outcome: str = "drawn"
    """What recorded steps learn from: `drawn`, what they led to, or `implied`, what they would have
    led to had they gone straight for the finished video (`outcomes.py`)."""
    shared_noise: bool = False
    """Whether a group starts from the same noise; what comes before its first stochastic step is
    then denoised once for all of it."""
    micro_batch: int = 16
    """Most videos in one pass of the transformer; bounds memory, not results."""
    update_micro_batch: int | None = None
    """The same for passes with gradient, which need far more memory; None is micro_batch. Another
    number than that changes the last bits of a replay, as the self-check shows."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "stochastic_steps", "prompts_per_update"):
            _at_least(name, getattr(self, name), 1)
        _at_least("micro_batch", self.micro_batch, 1)
        _at_least("update_micro_batch", self.learning_micro_batch, 1)
        if self.videos_per_prompt < 2:
            raise ValueError(
                f"videos_per_prompt must be at least 2, got {self.videos_per_prompt}; "
                "one video has nothing to compare with"
            )
        for name in ("guidance_scale", "train_guidance"):
            guidance = getattr(self, name)
            if guidance is not None and not 1 <= guidance < math.inf:
                raise ValueError(
                    f"{name} must be at least 1 and finite, got {guidance}; 1 means no guidance"
                )
        for name, known in (("outcome", OUTCOMES), ("steps_of", STEPS_OF)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.noise_level < math.inf:
            raise ValueError(
                f"noise_level must be above 0 and finite, got {self.noise_level}; 0.7 is usual"
            )
        if not 1 <= self.num_eligible <= self.num_inference_steps:
            raise ValueError(
                f"eligible_steps must be in [1, {self.num_inference_steps}], "
                f"got {self.eligible_steps}"
            )

    @property
    def num_eligible(self) -> int:
        """Steps the stochastic ones are drawn from."""
        if self.eligible_steps is not None:
            return self.eligible_steps
        return max(1, self.num_inference_steps - 1)

    @property
    def learning_micro_batch(self) -> int:
        """Most videos in one pass with gradient."""
        return self.micro_batch if self.update_micro_batch is None else self.update_micro_batch

    @property
    def learning_guidance(self) -> float:
        """Guidance of the prediction that learns."""
        return self.guidance_scale if self.train_guidance is None else self.train_guidance


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Trajectory:
    """Videos and the steps that led to them; every latent float32, so that replays are exact."""

    latents: Tensor
    """[S B C T H W] before each stochastic step."""
    next_latents: Tensor
    """[S B C T H W] after it."""
    means: Tensor
    """[S B C T H W] centre of each recorded step's Gaussian."""
    log_probs: Tensor
    """[B S] of each recorded step under the policy that took it."""
    log_prob_maps: Tensor
    """[B S T H W] the same at each latent position."""
    steps: Tensor
    """[S B] long: places in the schedule of each video's recorded steps, ascending."""
    sigmas: Tensor
    """[K+1] the whole schedule."""
    final_latent: Tensor
    """[B C T H W] what was decoded."""
    videos: Tensor
    """[B F C H W] float32 in [0, 1]."""
    embeddings: PromptEmbeddings
    """One row for each video."""
    prompt_index: Tensor
    """[B] long: which prompt each video shows."""
    seeds: tuple[int, ...]
    """One for each video."""
    transition: TransitionFunction
    """How the recorded steps were taken."""
    rows: Tensor
    """[B] long, ascending: places of these videos among all of the update's; the others are with
    other processes."""
    total: int
    """Videos of the update."""
    group: Tensor | None = None
    """[total] long: the group of each of the update's videos, which is what it is compared with;
    None outside of an update."""

    @property
    def sigma_max(self) -> Tensor:
        """Second noise level of the schedule, where Flow-SDE's diffusion is cut off."""
        return highest_sigma(self.sigmas)

    def levels(self, index: int, part: slice) -> tuple[Tensor, Tensor]:
        """Noise levels [b] before and after recorded step `index` of the videos `part`."""
        places = self.steps[index, part].to(self.sigmas.device)
        return self.sigmas[places], self.sigmas[places + 1]

    def keep(self, videos: Tensor) -> Trajectory:
        """Only the videos where `videos` ([total], of all processes) is True."""
        return replace(
            self.only(videos[self.rows]),
            rows=(videos.cumsum(0) - 1)[self.rows[videos[self.rows]]],
            total=int(videos.sum()),
            group=None if self.group is None else self.group[videos],
        )

    def only(self, own: Tensor) -> Trajectory:
        """Those of this process where `own` ([B]) is True, at their places among all as before."""
        rows = own.nonzero().flatten()
        at = rows.to(self.final_latent.device)
        return replace(
            self,
            latents=self.latents[:, at],
            next_latents=self.next_latents[:, at],
            means=self.means[:, at],
            log_probs=self.log_probs[at],
            log_prob_maps=self.log_prob_maps[at],
            steps=self.steps[:, rows],
            final_latent=self.final_latent[at],
            videos=self.videos[rows.to(self.videos.device)],
            embeddings=self.embeddings[rows],
            prompt_index=self.prompt_index[rows],
            seeds=tuple(self.seeds[row] for row in rows.tolist()),
            rows=self.rows[own],
        )


def eligible_steps(generator: AbstractVideoGenerator, settings: RolloutSettings) -> list[int]:
    """Places of the steps that may be stochastic: the first ones, where what learns takes part.

    Raises:
        ValueError: they are fewer than `stochastic_steps`.
    """
    learning = generator.learning_steps(generator.sigmas(settings.num_inference_steps))
    places = [place for place in learning if place < settings.num_eligible]
    if len(places) < settings.stochastic_steps:
        low, high = generator.learning_sigmas
        raise ValueError(
            f"rollout.stochastic_steps must be at most the {len(places)} of the first "
            f"{settings.num_eligible} steps at which what learns takes part (noise levels {low:g} "
            f"to {min(high, 1.0):g}), got {settings.stochastic_steps}; lower it, raise "
            "rollout.num_inference_steps or eligible_steps, or let both transformers learn"
        )
    return places


def predict_in_chunks(
    generator: AbstractVideoGenerator,
    latent: Tensor,
    sigma: Tensor,
    embeddings: PromptEmbeddings,
    guidance_scale: float,
    parts: Sequence[slice],
) -> Tensor:
    """Velocity [B C T H W] of the whole batch, the videos of one part at a time."""
    found = []
    for part in in_step(generator.transformer, parts):
        rows = torch.arange(part.start, part.stop)
        of_part = sigma[part] if sigma.ndim else sigma
        found.append(generator.predict(latent[part], of_part, embeddings[rows], guidance_scale))
    return torch.cat(found[: len(parts)]) if found else torch.zeros_like(latent)


def retake(
    trajectory: Trajectory, index: int, part: slice, prediction: Tensor, settings: RolloutSettings
) -> Transition:
    """Recorded step `index` of the videos `part`, with another prediction [B C T H W]."""
    return trajectory.transition(
        *(trajectory.latents[index, part], prediction, *trajectory.levels(index, part)),
        noise_level=settings.noise_level,
        sigma_max=trajectory.sigma_max,
        next_latent=trajectory.next_latents[index, part],
    )


@torch.no_grad()
def rollout(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    prompt_index: Tensor,
    seeds: Sequence[int],
    settings: RolloutSettings,
    *,
    transition: TransitionFunction = flow_sde,
    stochastic: Sequence[int] | Tensor = (),
    share: Share | None = None,
    keep: bool = True,
) -> Trajectory:
    """Draw one video for each (prompt, seed) with the generator's active policy.

    Videos of equal prompt and seed start from the same noise and explore each on its own; what
    comes before the first stochastic step is denoised once for all of them.

    Args:
        generator: the policy; runs without gradient.
        embeddings: [N ...] of the prompts.
        prompt_index: [N] long into `embeddings`.
        seeds: N integers; a seed fixes the initial noise and the exploration of its video.
        settings: steps, guidance, noise level and micro batch.
        transition: taken at the stochastic steps; all others are `ode`.
        stochastic: places of the recorded steps in [0, K), of all videos or, [S N] long, of each;
            none for a deterministic rollout.
        share: which of them are drawn here; None is all.
        keep: False records none of the steps that explore.

    Raises:
        ValueError: a seed is below 0.
        OutOfMemoryError: memory ran out; the message says what to change.
    """
    share = whole(len(seeds), settings.micro_batch) if share is None else share
    savings = partial(drawing_savings, generator, settings.micro_batch, len(share.rows))
    prompt_index, trunks, places, sources = _find_trunks(prompt_index, seeds, share)
    seeds = [seeds[row] for row in share.rows.tolist()]
    sigmas = generator.sigmas(settings.num_inference_steps).to(generator.device)
    text = embeddings[prompt_index]
    latent = generator.initial_latents([seeds[row] for row in trunks.tolist()])
    shared, parts = text[trunks], chunks(len(trunks), settings.micro_batch)
    every = steps_of_each(stochastic, share.total, settings.num_inference_steps)
    branching = int(every.min()) if len(every) else settings.num_inference_steps
    own = every[:, share.rows]
    recording = Recording(own, sources, transition, settings.noise_level, keep=keep)
    with explain_out_of_memory("drawing videos", savings):
        for step in range(settings.num_inference_steps):
            if step == branching:
                latent, shared, parts = latent[places.to(latent.device)], text, share.parts
            prediction = predict_in_chunks(
                generator, latent, sigmas[step], shared, settings.guidance_scale, parts
            )
            latent = recording.take(step, sigmas, latent, prediction)
        if branching == settings.num_inference_steps:
            latent = latent[places.to(latent.device)]
        videos = torch.cat([generator.decode(latent[part]) for part in share.parts])
    return Trajectory(
        latents=recording.latents(latent),
        next_latents=recording.next_latents(latent),
        means=recording.means(latent),
        log_probs=recording.log_probs(latent),
        log_prob_maps=recording.log_prob_maps(latent),
        steps=recording.steps,
        sigmas=sigmas,
        final_latent=latent,
        videos=videos,
        embeddings=text,
        prompt_index=prompt_index,
        seeds=tuple(int(seed) for seed in seeds),
        transition=transition,
        rows=share.rows,
        total=share.total,
    )


def _find_trunks(
    prompt_index: Tensor, seeds: Sequence[int], share: Share
) -> tuple[Tensor, Tensor, Tensor, list[torch.Generator]]:
    """Of a share: its prompts [B], the rows [U] that differ in prompt or seed, each video's place
    [B] among them, and its noise.

    Each explores with a noise of its own, also where several share a trunk.
    """
    if min(seeds, default=0) < 0:
        raise ValueError(f"seeds must be at least 0, got {min(seeds)}")
    every = list(zip(prompt_index.tolist(), map(int, seeds), strict=True))
    keys = [every[row] for row in share.rows.tolist()]
    rows = {key: row for row, key in reversed(list(enumerate(keys)))}
    distinct = sorted(rows, key=rows.__getitem__)
    sources = []
    for row, key in zip(share.rows.tolist(), keys, strict=True):
        # Hashed: torch's generator hears only 32 bits of a seed, so that an offset beyond them
        # would explore with the very noise that the video began from.
        words = np.random.SeedSequence((key[1], every[:row].count(key))).generate_state(1)
        sources.append(torch.Generator().manual_seed(int(words[0])))
    places = [distinct.index(key) for key in keys]
    trunks = torch.tensor([rows[key] for key in distinct])
    return prompt_index[share.rows], trunks, torch.tensor(places), sources
