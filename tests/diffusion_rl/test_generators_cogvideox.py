"""CogVideoX: a v-predicting diffusion model in the terms of flow matching, exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion_rl.generators.cogvideox import CogVideoXGenerator
from diffusion_rl.row_settings import SETTINGS
from diffusion_rl.transitions import TRANSITIONS, ddim
from tests.family_checks import (
    PROMPTS,
    STEPS,
    adapted,
    check_learns,
    check_run,
    check_same_videos,
    check_stock_loads,
    run_settings,
)
from tests.tiny_cogvideox import SIZE, build_tiny_cogvideox


def stock(pipeline: CogVideoXPipeline, latents: Tensor, guidance: float) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        **{name: SIZE[name] for name in ("height", "width", "num_frames", "max_sequence_length")},
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=latents.transpose(1, 2),
        output_type="pt",
    ).frames


@pytest.fixture
def generator() -> CogVideoXGenerator:
    return CogVideoXGenerator(build_tiny_cogvideox(), **SIZE)


@pytest.mark.parametrize("version", ["2b", "5b", "1.5"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_videos_are_the_pipelines(version: str, guidance: float) -> None:
    generator = CogVideoXGenerator(build_tiny_cogvideox(version=version), **SIZE)
    assert generator.latent_shape == (4, 4 if version == "1.5" else 3, 2, 2)
    check_same_videos(generator, stock, guidance)


def test_levels_are_the_schedulers(generator: CogVideoXGenerator) -> None:
    scheduler = generator.pipeline.scheduler
    sigmas = generator.sigmas(50)
    scheduler.set_timesteps(50)
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    # A latent's signal-to-noise ratio does not change when the latent is scaled.
    ratio = ((1 - sigmas[:-1].double()) / sigmas[:-1].double()) ** 2
    torch.testing.assert_close(ratio, (kept / (1 - kept)).double(), rtol=1e-4, atol=1e-9)
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert bool((sigmas.diff() < 0).all())
    assert sigmas.dtype == torch.float32


def test_every_level_has_its_timestep(generator: CogVideoXGenerator) -> None:
    levels = generator.levels
    assert torch.equal(generator.timestep(levels), torch.arange(1000.0))
    half = (levels[300] + levels[301]) / 2
    torch.testing.assert_close(
        generator.timestep(half[None]), torch.tensor([300.5]), rtol=1e-4, atol=0
    )
    assert generator.timestep(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


def test_exploring_steps_are_those_of_diffusers_ddim(generator: CogVideoXGenerator) -> None:
    """The step `ddim` with eta, scaled back, is DDIMScheduler's with the model's own output."""
    own = generator.pipeline.scheduler
    reference = DDIMScheduler.from_config(own.config, trained_betas=None)
    reference.alphas_cumprod = own.alphas_cumprod.double()
    reference.set_timesteps(STEPS)
    sigmas, eta = generator.sigmas(STEPS).double(), 0.6
    embeddings = generator.encode_prompts(PROMPTS)
    latent = generator.initial_latents([0, 1])
    for place, timestep in enumerate(reference.timesteps[:-1]):
        level, next_level = sigmas[place], sigmas[place + 1]
        scale, next_scale = (torch.hypot(1 - s, s).float() for s in (level, next_level))
        prediction = generator.predict(latent, level.float(), embeddings, 1.0)
        options = {"noise_level": eta, "sigma_max": 0.9}
        step = ddim(latent, prediction, level, next_level, **options)
        noise = (step.next_latent - step.mean) / step.std
        v = generator.pipeline.transformer(
            (latent / scale).transpose(1, 2),
            embeddings.conditional,
            timestep.expand(2),
            image_rotary_emb=generator.pipeline._prepare_rotary_positional_embeddings(
                16, 16, 3, latent.device
            ),
            return_dict=False,
        )[0].transpose(1, 2)
        expected = reference.step(
            v, timestep, latent / scale, eta=eta, variance_noise=noise, return_dict=False
        )[0]
        torch.testing.assert_close(step.next_latent / next_scale, expected, rtol=1e-4, atol=1e-4)
        latent = step.next_latent


@pytest.mark.parametrize("name", TRANSITIONS)
def test_every_transition_keeps_to_the_schedule(name: str, generator: CogVideoXGenerator) -> None:
    """Data of one known spread come out as from a flow-matching schedule, whatever the step."""
    spread, noise_level = 0.5, {"ddim": 1.0, "dance_sde": 0.25}.get(name, 0.5)
    even = FlowMatchEulerDiscreteScheduler(shift=1.0)
    even.set_timesteps(50)
    found = []
    for sigmas in (generator.sigmas(50), even.sigmas):
        latent = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        source = torch.Generator().manual_seed(1)
        for place in range(50):
            sigma, after = sigmas[place], sigmas[place + 1]
            variance = (1 - sigma) ** 2 * spread**2 + sigma**2
            prediction = (sigma - (1 - sigma) * spread**2) / variance * latent
            take = TRANSITIONS[name if place < 49 else "ode"]
            options = {"noise_level": noise_level, "sigma_max": sigmas[1], "generator": source}
            latent = take(latent, prediction, sigma, after, **options).next_latent
        found.append(latent.std().item())
    assert abs(found[0] / found[1] - 1) < 0.05


def test_ddpo_goes_through_a_run(tmp_path: Path) -> None:
    settings = run_settings(
        *("cogvideox", tmp_path / "pipeline", tmp_path / "run", SIZE),
        algorithm={"name": "ddpo", "history_min_count": 2},
        rollout={"guidance_scale": 6.0, "noise_level": 1.0},
    )
    loaded = check_run(settings, build_tiny_cogvideox())

    def load() -> CogVideoXPipeline:
        pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "pipeline")
        pipeline.load_lora_weights(tmp_path / "run" / "lora")
        return pipeline

    check_stock_loads(loaded, load, stock, 6.0)


@pytest.mark.parametrize("row", sorted(set(SETTINGS) - {"ddpo"}))
def test_every_other_row_learns(row: str, generator: CogVideoXGenerator) -> None:
    check_learns(generator, row)


def test_lora_targets_are_all_attention_and_feed_forward_layers(
    tmp_path: Path, generator: CogVideoXGenerator
) -> None:
    names = adapted(generator, run_settings("cogvideox", tmp_path, tmp_path / "run", SIZE))
    # Two blocks with one attention (4 layers) and one feed-forward (2) for text and video.
    assert len(names) == 2 * (4 + 2)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "epsilon"},
        {"rescale_betas_zero_snr": False},
        {"timestep_spacing": "leading"},
        {"set_alpha_to_one": False},
    ],
)
def test_other_schedules_are_refused(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    message = f"must have {name}=.*, got {value} of CogVideoXDDIM.*; CogVideoX is a diffusion model"
    with pytest.raises(ValueError, match=message):
        CogVideoXGenerator(build_tiny_cogvideox(**change), **SIZE)


def test_a_flow_matching_scheduler_is_refused() -> None:
    pipeline = build_tiny_cogvideox()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match="got None of FlowMatchEuler.*: use CogVideoXDDIMScheduler"
    ):
        CogVideoXGenerator(pipeline, **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_sequence_length": 226}, "max_sequence_length must be the model's 12, got 226"),
        ({"num_frames": 13}, "num_frames must be 1 more than a multiple of 8, got 13"),
        ({"height": 24}, "height must be a positive multiple of 16, got 24"),
    ],
)
def test_sizes_the_model_cannot_make_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CogVideoXGenerator(build_tiny_cogvideox(), **(SIZE | change))
