"""WanGenerator against diffusers' own pipeline, and every door it closes."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, WanPipeline

from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.sampling import sample_videos
from tests.family_checks import adapted, run_settings
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan

PROMPTS = ["a red circle moves left", "the blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture
def generator() -> WanGenerator:
    return WanGenerator(build_tiny_wan(), **SIZE)


def pipeline_videos(pipeline: WanPipeline, latents: torch.Tensor, guidance: float) -> torch.Tensor:
    """What stock diffusers makes of the same prompts and noise."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        height=SIZE["height"],
        width=SIZE["width"],
        num_frames=SIZE["num_frames"],
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=latents,
        output_type="pt",
        max_sequence_length=SIZE["max_sequence_length"],
    ).frames


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_videos_equal_the_pipelines_to_the_last_bit(folder: Path, guidance: float) -> None:
    generator = WanGenerator.from_pretrained(folder, **SIZE, batched_guidance=False)
    videos = sample_videos(
        generator, PROMPTS, [3, 4], num_inference_steps=4, guidance_scale=guidance
    )
    stock = WanPipeline.from_pretrained(folder)
    assert torch.equal(videos, pipeline_videos(stock, generator.initial_latents([3, 4]), guidance))
    assert videos.shape == (2, 5, 3, 16, 16)
    assert 0 <= videos.min() < videos.max() <= 1


def test_guidance_in_one_pass_is_guidance_in_two(generator: WanGenerator) -> None:
    latent, sigma = generator.initial_latents([0, 1]), torch.tensor(0.7)
    embeddings = generator.encode_prompts(PROMPTS)
    one_pass = generator.predict(latent, sigma, embeddings, 3.0)
    generator.batched_guidance = False
    torch.testing.assert_close(one_pass, generator.predict(latent, sigma, embeddings, 3.0))
    assert not torch.allclose(one_pass, generator.predict(latent, sigma, embeddings, 1.0))


def test_each_video_may_have_its_own_noise_level(generator: WanGenerator) -> None:
    latent = generator.initial_latents([0, 1])
    embeddings = generator.encode_prompts(PROMPTS)
    together = generator.predict(latent, torch.tensor([0.9, 0.2]), embeddings, 1.0)
    for row, sigma in enumerate((0.9, 0.2)):
        alone = generator.predict(
            latent[row : row + 1], torch.tensor(sigma), embeddings[torch.tensor([row])], 1.0
        )
        torch.testing.assert_close(together[row : row + 1], alone)


def test_a_seed_gives_the_same_noise_in_any_batch(generator: WanGenerator) -> None:
    together = generator.initial_latents([5, 6, 7])
    assert torch.equal(together[1:2], generator.initial_latents([6]))
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 4, 2, 2, 2)
    assert together.dtype == torch.float32


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_sigmas_are_the_schedulers(scheduler: str) -> None:
    pipeline = build_tiny_wan(scheduler=scheduler)
    sigmas = WanGenerator(pipeline, **SIZE).sigmas(6)
    pipeline.scheduler.set_timesteps(6)
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == pytest.approx(1, abs=1e-4)
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    # Shift 3 keeps more of the schedule at high noise than an even one.
    assert sigmas[3] > 0.5


def test_embeddings_are_taken_by_number(generator: WanGenerator) -> None:
    embeddings = generator.encode_prompts(PROMPTS)
    assert len(embeddings) == 2
    assert embeddings.conditional.shape == (2, 12, 16)
    assert embeddings.unconditional.shape == (1, 12, 16)
    chosen = embeddings[torch.tensor([1, 1, 0])]
    assert torch.equal(chosen.conditional, embeddings.conditional[[1, 1, 0]])
    assert not torch.equal(chosen.conditional[0], chosen.conditional[2])


def test_the_text_encoder_can_be_released(generator: WanGenerator) -> None:
    generator.release_text_encoder()
    assert generator.pipeline.text_encoder is None
    with pytest.raises(RuntimeError, match="encode_prompts must be called before"):
        generator.encode_prompts(PROMPTS)


def test_only_what_is_asked_for_carries_gradient(generator: WanGenerator) -> None:
    assert not any(part.requires_grad for part in generator.transformer.parameters())
    assert not any(part.requires_grad for part in generator.pipeline.vae.parameters())


def test_half_precision_predicts_in_float32(folder: Path) -> None:
    generator = WanGenerator.from_pretrained(folder, **SIZE, dtype="bfloat16")
    assert generator.transformer.dtype == torch.bfloat16
    assert generator.pipeline.vae.dtype == torch.float32
    videos = sample_videos(generator, PROMPTS, [3, 4], num_inference_steps=2, guidance_scale=2.0)
    assert videos.dtype == torch.float32
    embeddings = generator.encode_prompts(PROMPTS)
    latent = generator.initial_latents([0, 1])
    assert generator.predict(latent, torch.tensor(1.0), embeddings, 1.0).dtype == torch.float32


def test_lora_targets_are_all_attention_and_feed_forward_layers(
    tmp_path: Path, generator: WanGenerator
) -> None:
    names = adapted(generator, run_settings("wan", tmp_path, tmp_path / "run", SIZE))
    # Two blocks with self- and cross-attention (4 layers each) and one feed-forward (2).
    assert len(names) == 2 * (4 + 4 + 2)
    places = {name[name.index("blocks.") :].split(".", 2)[2] for name in names}
    attention = {f"attn{k}.to_{part}" for k in (1, 2) for part in ("q", "k", "v", "out.0")}
    assert places == attention | {"ffn.net.0.proj", "ffn.net.2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 24}, "height must be a positive multiple of 16, got 24"),
        ({"width": 0}, "width must be a positive multiple of 16, got 0"),
        ({"num_frames": 6}, "num_frames must be 1 more than a multiple of 4, got 6"),
    ],
)
def test_sizes_the_model_cannot_make_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanGenerator(build_tiny_wan(), **(SIZE | change))


def test_pipelines_of_another_kind_are_refused() -> None:
    two_stage = build_tiny_wan()
    two_stage.transformer_2 = two_stage.transformer
    with pytest.raises(ValueError, match="exactly one transformer"):
        WanGenerator(two_stage, **SIZE)
    per_token = build_tiny_wan()
    per_token.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="expand_timesteps=False"):
        WanGenerator(per_token, **SIZE)
    diffusion = build_tiny_wan()
    diffusion.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="must be a flow-matching one .*, got DDIMScheduler"):
        WanGenerator(diffusion, **SIZE)


def test_bad_arguments_are_refused(generator: WanGenerator, folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got f8"):
        WanGenerator.from_pretrained(folder, **SIZE, dtype="f8")
    with pytest.raises(ValueError, match="prompts must be at least one text, got none"):
        generator.encode_prompts([])
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        generator.sigmas(0)


def test_a_missing_model_is_one_clear_error(tmp_path: Path) -> None:
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    with pytest.raises(FileNotFoundError, match=f"got {name}; .*cache .*--local-path FOLDER"):
        WanGenerator.from_pretrained(name, **SIZE)
    with pytest.raises(FileNotFoundError, match="--local-path must be an existing folder"):
        WanGenerator.from_pretrained(name, **SIZE, local_path=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="with a model_index.json, got"):
        WanGenerator.from_pretrained(tmp_path, **SIZE)


def test_a_local_path_stands_for_the_hub(folder: Path) -> None:
    generator = WanGenerator.from_pretrained("Wan-AI/any-name", **SIZE, local_path=folder)
    assert generator.latent_shape == (4, 2, 2, 2)
