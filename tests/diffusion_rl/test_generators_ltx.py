"""LTX-Video: packed latents, a schedule that depends on the size, masks, a decoder with noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LTXPipeline
from torch import Tensor

from diffusion_rl.generators.ltx import LtxGenerator
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
from tests.tiny_ltx import SIZE, build_tiny_ltx


def stock(pipeline: LTXPipeline, latents: Tensor, guidance: float, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS[: len(latents)],
        **{name: SIZE[name] for name in ("height", "width", "num_frames", "max_sequence_length")},
        frame_rate=25,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=LTXPipeline._pack_latents(latents),
        output_type="pt",
        **options,
    ).frames


@pytest.fixture
def generator() -> LtxGenerator:
    return LtxGenerator(build_tiny_ltx(), **SIZE)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_videos_are_the_pipelines(generator: LtxGenerator, guidance: float) -> None:
    assert generator.latent_shape == (4, 2, 4, 4)
    check_same_videos(generator, stock, guidance)


def test_fps_sets_the_positions_in_time(generator: LtxGenerator) -> None:
    generator.fps = 12.0
    with pytest.raises(AssertionError, match="not close"):
        check_same_videos(generator, stock, 1.0)


def test_the_schedule_depends_on_the_size(generator: LtxGenerator) -> None:
    small = generator.sigmas(STEPS)
    large = LtxGenerator(build_tiny_ltx(), **{**SIZE, "height": 64}).sigmas(STEPS)
    for sigmas in (small, large):
        assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
        assert sigmas[-2] == pytest.approx(0.1)  # shift_terminal
    assert bool((large[1:-2] > small[1:-2]).all())


def test_padding_is_masked(generator: LtxGenerator) -> None:
    embeddings = generator.encode_prompts(PROMPTS)
    mask = embeddings.conditional_extras["encoder_attention_mask"]
    assert mask.sum(1).tolist() == [6, 4]  # Words and the end.
    latent, sigma = generator.initial_latents([0, 1]), torch.tensor(0.7)
    expected = generator.predict(latent, sigma, embeddings, 3.0)
    embeddings.conditional[~mask] = 7.0
    torch.testing.assert_close(generator.predict(latent, sigma, embeddings, 3.0), expected)
    swapped = embeddings[torch.tensor([1, 0])]
    assert torch.equal(swapped.conditional_extras["encoder_attention_mask"], mask[[1, 0]])
    generator.batched_guidance = False
    torch.testing.assert_close(generator.predict(latent, sigma, embeddings, 3.0), expected)


def test_a_decoder_with_noise_always_makes_the_same_video() -> None:
    options = {"decode_timestep": 0.05, "decode_noise_scale": 0.5}
    generator = LtxGenerator(build_tiny_ltx(noisy_decoder=True), **SIZE, **options)
    latent = generator.initial_latents([0, 1])
    state = torch.get_rng_state()
    videos = generator.decode(latent)
    assert torch.equal(videos, generator.decode(latent))
    assert torch.equal(videos[1:], generator.decode(latent[1:]))
    assert torch.equal(torch.get_rng_state(), state)
    quiet = LtxGenerator(generator.pipeline, **SIZE, decode_timestep=0.05, decode_noise_scale=0.0)
    assert not torch.allclose(quiet.decode(latent), videos)


def test_a_decoder_with_a_timestep_makes_the_pipelines_videos() -> None:
    pipeline = build_tiny_ltx(noisy_decoder=True)
    for name, parameter in pipeline.vae.named_parameters():
        if "per_channel_scale" in name:  # Noise that the pipeline cannot be made to repeat.
            parameter.data.zero_()
    quiet = {"decode_timestep": 0.05, "decode_noise_scale": 0.0}
    generator = LtxGenerator(pipeline, **SIZE, **quiet)
    check_same_videos(generator, lambda *inputs: stock(*inputs, **quiet), 3.0)
    noisy = LtxGenerator(pipeline, **SIZE, decode_timestep=0.3)
    latent = noisy.initial_latents([3])
    final = stock_latent(pipeline, latent)
    source = torch.Generator().manual_seed(0)
    expected = stock(pipeline, latent, 1.0, decode_timestep=0.3, generator=source)
    torch.testing.assert_close(noisy.decode(final), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(generator.decode(final), expected, atol=1e-3)


def stock_latent(pipeline: LTXPipeline, latents: Tensor) -> Tensor:
    """What the pipeline would decode, [1 C T H W]."""
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline(
        PROMPTS[:1],
        **{name: SIZE[name] for name in ("height", "width", "num_frames", "max_sequence_length")},
        frame_rate=25,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=LTXPipeline._pack_latents(latents),
        output_type="latent",
    ).frames
    return LTXPipeline._unpack_latents(packed, *latents.shape[2:])


def test_grpo_goes_through_a_run(tmp_path: Path) -> None:
    settings = run_settings(
        *("ltx", tmp_path / "pipeline", tmp_path / "run", SIZE), rollout={"guidance_scale": 3.0}
    )
    loaded = check_run(settings, build_tiny_ltx())

    def load() -> LTXPipeline:
        pipeline = LTXPipeline.from_pretrained(tmp_path / "pipeline")
        pipeline.load_lora_weights(tmp_path / "run" / "lora")
        return pipeline

    check_stock_loads(loaded, load, stock, 3.0)


@pytest.mark.parametrize("row", ["ddpo", "awm", "nft"])
def test_other_rows_learn(row: str, generator: LtxGenerator) -> None:
    check_learns(generator, row)


def test_lora_targets_are_all_attention_and_feed_forward_layers(
    tmp_path: Path, generator: LtxGenerator
) -> None:
    names = adapted(generator, run_settings("ltx", tmp_path, tmp_path / "run", SIZE))
    # Two blocks with self- and cross-attention (4 layers each) and one feed-forward (2).
    assert len(names) == 2 * (4 + 4 + 2)


@pytest.mark.parametrize(
    ("noisy", "options", "message"),
    [
        (True, {"decode_timestep": 2.0}, r"decode_timestep must be in \[0, 1\], got 2.0"),
        (True, {"decode_noise_scale": -1.0}, r"decode_noise_scale must be in \[0, 1\], got -1.0"),
        (False, {"decode_timestep": 0.05}, "decode_timestep must be left out for an autoencoder"),
        (False, {"height": 48}, "height must be a positive multiple of 32, got 48"),
        (False, {"num_frames": 8}, "num_frames must be 1 more than a multiple of 4, got 8"),
    ],
)
def test_bad_options_are_refused(noisy: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LtxGenerator(build_tiny_ltx(noisy_decoder=noisy), **(SIZE | options))


def test_a_scheduler_of_another_process_is_refused() -> None:
    pipeline = build_tiny_ltx()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="must be a flow-matching one .*, got DDIMScheduler"):
        LtxGenerator(pipeline, **SIZE)
