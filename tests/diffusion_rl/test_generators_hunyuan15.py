"""HunyuanVideo 1.5: two text encoders, masks, empty image inputs, guidance of the rollout's own."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, HunyuanVideo15Pipeline
from torch import Tensor

from diffusion_rl.generators.base import LORA_FILE
from diffusion_rl.generators.hunyuan15 import HunyuanVideo15Generator
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
from tests.tiny_hunyuan15 import SIZE, build_tiny_hunyuan15


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths that the pipeline fixes, made small: of quoted text and of an image's tokens."""
    begin = HunyuanVideo15Pipeline.__init__

    def begin_small(self: HunyuanVideo15Pipeline, *parts: Any, **named: Any) -> None:
        begin(self, *parts, **named)
        self.tokenizer_2_max_length, self.vision_num_semantic_tokens = 16, 3

    # from_pretrained reads the names of the parts from the signature.
    begin_small.__signature__ = inspect.signature(begin)
    monkeypatch.setattr(HunyuanVideo15Pipeline, "__init__", begin_small)


def stock(pipeline: HunyuanVideo15Pipeline, latents: Tensor, guidance: float) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.tokenizer_max_length = SIZE["max_sequence_length"]
    # One by one: the autoencoder's attention takes no batch in diffusers 0.42.1.
    videos = [
        pipeline(
            prompt,
            **{name: SIZE[name] for name in ("height", "width", "num_frames")},
            num_inference_steps=STEPS,
            latents=latent[None],
            output_type="pt",
        ).frames
        for prompt, latent in zip(PROMPTS, latents, strict=True)
    ]
    return torch.cat(videos)


@pytest.fixture
def generator() -> HunyuanVideo15Generator:
    return HunyuanVideo15Generator(build_tiny_hunyuan15(), **SIZE)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_videos_are_the_pipelines(generator: HunyuanVideo15Generator, guidance: float) -> None:
    assert generator.latent_shape == (4, 2, 4, 4)
    check_same_videos(generator, stock, guidance)


def test_quoted_text_is_read_by_the_second_encoder(generator: HunyuanVideo15Generator) -> None:
    prompts = ["a red circle", 'a red circle "up"', 'a red circle "down"']
    embeddings = generator.encode_prompts(prompts)
    mask = embeddings.conditional_extras["encoder_attention_mask_2"]
    assert mask.sum(1).tolist() == [0, 12, 14]
    quoted = embeddings.conditional_extras["encoder_hidden_states_2"]
    assert quoted.shape == (3, 16, 8)
    assert not torch.allclose(quoted[1], quoted[2])
    latent = generator.initial_latents([0]).expand(3, -1, -1, -1, -1)
    for guidance in (1.0, 6.0):
        found = generator.predict(latent, torch.tensor(0.7), embeddings, guidance)
        assert (found[0] - found[1]).abs().max() > 1e-4
        generator.batched_guidance = not generator.batched_guidance
        again = generator.predict(latent, torch.tensor(0.7), embeddings, guidance)
        torch.testing.assert_close(again, found)


def test_padding_is_masked(generator: HunyuanVideo15Generator) -> None:
    embeddings = generator.encode_prompts(PROMPTS)
    mask = embeddings.conditional_extras["encoder_attention_mask"].bool()
    assert mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [6, 4]  # Words and the end.
    latent, sigma = generator.initial_latents([0, 1]), torch.tensor(0.7)
    expected = generator.predict(latent, sigma, embeddings, 6.0)
    embeddings.conditional[~mask] = 7.0
    torch.testing.assert_close(generator.predict(latent, sigma, embeddings, 6.0), expected)


def test_both_text_encoders_are_released(generator: HunyuanVideo15Generator) -> None:
    generator.release_text_encoder()
    assert generator.pipeline.text_encoder is generator.pipeline.text_encoder_2 is None
    with pytest.raises(RuntimeError, match="encode_prompts must be called before"):
        generator.encode_prompts(PROMPTS)


def test_nft_goes_through_a_run(tmp_path: Path) -> None:
    """The pipeline has no loader of LoRAs; its transformer has."""
    settings = run_settings(
        *("hunyuan1.5", tmp_path / "pipeline", tmp_path / "run", SIZE),
        algorithm={"name": "nft", "inner_steps": 1},
        rollout={"guidance_scale": 6.0},
    )
    loaded = check_run(settings, build_tiny_hunyuan15())

    def load() -> HunyuanVideo15Pipeline:
        pipeline = HunyuanVideo15Pipeline.from_pretrained(tmp_path / "pipeline")
        # Without the name diffusers 0.42.1 does not read the file's alpha.
        pipeline.transformer.load_lora_adapter(tmp_path / "run" / "lora", weight_name=LORA_FILE)
        return pipeline

    assert not hasattr(HunyuanVideo15Pipeline, "load_lora_weights")
    check_stock_loads(loaded, load, stock, 6.0)


@pytest.mark.parametrize("row", ["grpo", "ddpo"])
def test_other_rows_learn(row: str, generator: HunyuanVideo15Generator) -> None:
    check_learns(generator, row)


def test_lora_targets_are_all_attention_and_feed_forward_layers(
    tmp_path: Path, generator: HunyuanVideo15Generator
) -> None:
    names = adapted(generator, run_settings("hunyuan1.5", tmp_path, tmp_path / "run", SIZE))
    # Two blocks: one attention for video (4 layers) and text (4), a feed-forward for each (2 + 2);
    # one block that refines the text: attention (4) and feed-forward (2).
    assert len(names) == 2 * (4 + 4 + 2 + 2) + (4 + 2)


def test_sizes_and_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 18"):
        HunyuanVideo15Generator(build_tiny_hunyuan15(), **{**SIZE, "width": 18})
    pipeline = build_tiny_hunyuan15()
    pipeline.transformer.register_to_config(in_channels=4)
    with pytest.raises(ValueError, match=r"= 9 in_channels \(latent, first frame, mask\), got 4"):
        HunyuanVideo15Generator(pipeline, **SIZE)
    pipeline = build_tiny_hunyuan15()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="must be a flow-matching one .*, got DDIMScheduler"):
        HunyuanVideo15Generator(pipeline, **SIZE)
