"""Wan 2.2: two transformers of which one or both learn, and a timestep for each token."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from diffusion_rl import processes
from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE
from diffusion_rl.generators.wan22 import Wan22Generator
from diffusion_rl.launch import prepare, train
from diffusion_rl.lora import (
    LoraSettings,
    attach_lora,
    lora_state,
    trained_parameters,
    tuner_layers,
)
from diffusion_rl.lora_files import load_lora, save_lora
from diffusion_rl.noising import draw_sigmas
from diffusion_rl.rollout import RolloutSettings, eligible_steps
from diffusion_rl.sharding import is_sharded, shard
from tests.family_checks import (
    PROMPTS,
    SEEDS,
    STEPS,
    adapted,
    check_run,
    check_same_videos,
    check_stock_loads,
    run_settings,
    sample,
)
from tests.several import run_on
from tests.tiny_wan import build_tiny_wan
from tests.tiny_wan22 import A14B_SIZE, TI2V_SIZE, build_tiny_a14b, build_tiny_ti2v

# With shift 3 the first two of four steps are above it.
BOUNDARY = 0.8
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def stock(pipeline: WanPipeline, latents: Tensor, guidance: float, **options: Any) -> Tensor:
    size = TI2V_SIZE if pipeline.config.expand_timesteps else A14B_SIZE
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        **{name: size[name] for name in ("height", "width", "num_frames", "max_sequence_length")},
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=latents,
        output_type="pt",
        **options,
    ).frames


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_videos_are_the_pipelines(guidance: float) -> None:
    check_same_videos(Wan22Generator(build_tiny_a14b(), **A14B_SIZE), stock, guidance)
    check_same_videos(Wan22Generator(build_tiny_ti2v(), **TI2V_SIZE), stock, guidance)


def test_each_transformer_has_its_own_guidance() -> None:
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE, guidance_scale_2=2.0)

    def with_second(pipeline: WanPipeline, latents: Tensor, guidance: float) -> Tensor:
        second = 2.0 if guidance > 1 else None
        return stock(pipeline, latents, guidance, guidance_scale_2=second)

    for guidance in (1.0, 4.0):
        check_same_videos(generator, with_second, guidance)
    with pytest.raises(AssertionError):
        check_same_videos(generator, stock, 4.0)


def test_the_noise_level_chooses_the_transformer() -> None:
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE)
    embeddings = generator.encode_prompts(PROMPTS)
    latent = generator.initial_latents([0, 1])
    together = generator.predict(latent, torch.tensor([BOUNDARY, 0.7999]), embeddings, 1.0)
    for row, name in enumerate(("transformer", "transformer_2")):
        timestep = torch.tensor([1000 * (BOUNDARY, 0.7999)[row]])
        transformer = getattr(generator.pipeline, name)
        text = embeddings.conditional[row : row + 1]
        alone = transformer(latent[row : row + 1], timestep, text, return_dict=False)[0]
        torch.testing.assert_close(together[row : row + 1], alone)


def test_every_token_of_ti2v_has_its_timestep() -> None:
    """Alike, they predict as one timestep would; so the transformer is asked, not the videos."""
    seen = []
    pipeline = build_tiny_ti2v()
    forward = pipeline.transformer.forward

    def record(hidden_states: Tensor, timestep: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(timestep)
        return forward(hidden_states, timestep, *args, **options)

    pipeline.transformer.forward = record
    generator = Wan22Generator(pipeline, **TI2V_SIZE)
    stock(pipeline, generator.initial_latents(SEEDS), 1.0)
    expected, seen[:] = list(seen), []
    sample(generator, 1.0)
    assert [timestep.shape for timestep in seen] == [(2, 2 * 1 * 1)] * STEPS
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    ("learns", "files"),
    [("high", {LORA_FILE}), ("low", {SECOND_LORA_FILE}), (None, {LORA_FILE, SECOND_LORA_FILE})],
)
def test_a14b_goes_through_a_run(learns: str | None, files: set[str], tmp_path: Path) -> None:
    options = {"learns": learns} if learns else {}
    settings = run_settings(
        "wan2.2",
        tmp_path / "pipeline",
        tmp_path / "run",
        {**A14B_SIZE, "options": options},
        algorithm={"name": "grpo", "clip_range": 1e-3},
        rollout={"stochastic_steps": 1 if learns == "low" else 2, "guidance_scale": 4.0},
    )
    loaded = check_run(settings, build_tiny_a14b())
    lora = tmp_path / "run" / "lora"
    assert {path.name for path in lora.iterdir()} == {*files, "README.md"}

    def load() -> WanPipeline:
        pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
        for name in files:
            second = {"load_into_transformer_2": True} if name == SECOND_LORA_FILE else {}
            pipeline.load_lora_weights(lora, weight_name=name, **second)
        return pipeline

    check_stock_loads(loaded, load, stock, 4.0)


@pytest.mark.parametrize(("learns", "low", "high"), [("low", 0, BOUNDARY), ("high", BOUNDARY, 1)])
def test_forward_process_rows_learn_where_the_learner_predicts(
    learns: str, low: float, high: float, tmp_path: Path
) -> None:
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE, learns=learns)
    schedule = generator.learning_schedule(generator.sigmas(STEPS))
    drawn = draw_sigmas(schedule, 500, torch.Generator().manual_seed(0))
    assert low <= drawn.min() < low + 0.01
    assert high - 0.01 < drawn.max() <= high
    assert bool(((drawn >= BOUNDARY) == (learns == "high")).all())
    # With what learns nowhere near a noise level, its prediction would carry no gradient.
    settings = run_settings(
        "wan2.2",
        tmp_path / "pipeline",
        tmp_path / "run",
        {**A14B_SIZE, "options": {"learns": learns}},
        algorithm={"name": "nft", "inner_steps": 1},
    )
    check_run(settings, build_tiny_a14b())


def test_ti2v_goes_through_a_run(tmp_path: Path) -> None:
    settings = run_settings(
        "wan2.2", tmp_path / "pipeline", tmp_path / "run", TI2V_SIZE, algorithm={"name": "nft"}
    )
    loaded = check_run(settings, build_tiny_ti2v())

    def load() -> WanPipeline:
        pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
        pipeline.load_lora_weights(tmp_path / "run" / "lora")
        return pipeline

    check_stock_loads(loaded, load, stock, 1.0)


def test_only_the_learners_steps_are_stochastic() -> None:
    settings = RolloutSettings(num_inference_steps=STEPS, stochastic_steps=1)
    found = {
        learns: eligible_steps(
            Wan22Generator(build_tiny_a14b(), **A14B_SIZE, learns=learns), settings
        )
        for learns in ("high", "low", "both")
    }
    assert found == {"high": [0, 1], "low": [2], "both": [0, 1, 2]}
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE, learns="low")
    message = r"must be at most the 1 of the first 3 steps .* \(noise levels 0 to 0.8\), got 2; "
    with pytest.raises(ValueError, match=message + ".* or let both transformers learn"):
        eligible_steps(generator, RolloutSettings(num_inference_steps=STEPS, stochastic_steps=2))


def test_lora_targets_are_all_attention_and_feed_forward_layers(tmp_path: Path) -> None:
    settings = run_settings("wan2.2", tmp_path, tmp_path / "run", A14B_SIZE)
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE)
    names = adapted(generator, settings)
    # Two transformers of 2 blocks, each with self- and cross-attention (4 layers each) and FFN (2).
    assert len(names) == 2 * 2 * (4 + 4 + 2)
    assert {name.split(".")[0] for name in names} == {"high", "low"}
    assert len(trained_parameters(generator.transformer)) == 2 * len(names)


SIGMAS = {
    "one each": ((0.9, 0.9), (0.3, 0.3)),
    "both and one": ((0.9, 0.3), (0.3, 0.3)),
    "one for all": ((0.3, 0.3), (0.3, 0.3)),
}
"""Noise levels of two videos of each of two processes."""


def learn(sigmas: tuple[tuple[float, float], ...], **launcher: str) -> Any:
    """Predictions of videos, 2 of each tuple, and the gradient of all, over the processes of a run.

    Weights are in parts where a launcher's variables ask for it.
    """
    options = {**A14B_SIZE, "guidance_scale_2": 2.0, "batched_guidance": False}
    generator = Wan22Generator(build_tiny_a14b(), **options)
    for part in generator.transformer.values():
        part.enable_gradient_checkpointing()
    learning = attach_lora(generator.transformer, LoraSettings(rank=2, init="gaussian"))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in learning:
            one.copy_(torch.randn(one.shape, generator=source) / 10)
    if launcher:
        shard(generator.transformer, learning, launcher)
    embeddings = generator.encode_prompts(PROMPTS)
    predictions = []
    for number in (processes.rank(),) if launcher else range(len(sigmas)):
        latent = generator.initial_latents([2 * number, 2 * number + 1])
        sigma = torch.tensor(sigmas[number])
        with torch.no_grad():
            seen = generator.predict(latent, sigma, embeddings, 3.0)
        made = generator.predict(latent, sigma, embeddings, 3.0)
        assert torch.equal(made, seen)
        made.square().mean().backward()
        predictions.append(made.detach())
    processes.add_up_gradients(learning)
    return predictions, [one.grad for one in learning]


@pytest.mark.parametrize("sigmas", SIGMAS.values(), ids=SIGMAS)
def test_processes_with_other_noise_levels_pass_through_sharded_transformers_together(
    sigmas: tuple[tuple[float, float], ...],
) -> None:
    expected, gradients = learn(sigmas)
    for rank, found in enumerate(run_on(2, lambda: learn(sigmas, **FSDP))):
        assert isinstance(found, tuple), found
        torch.testing.assert_close(found[0], [expected[rank]])
        for own, other in zip(found[1], gradients, strict=True):
            assert (own is None) == (other is None)
            torch.testing.assert_close(own, other)
    # Without high noise anywhere the first transformer is not passed at all.
    assert (gradients[0] is None) == (sigmas == SIGMAS["one for all"])


@pytest.mark.parametrize("learns", ["high", "low", "both"])
def test_a14b_in_parts_learns_what_it_learns_whole(
    learns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the transformer that does not learn lies in parts."""
    build_tiny_a14b().save_pretrained(tmp_path / "pipeline")
    settings = run_settings(
        *("wan2.2", tmp_path / "pipeline", tmp_path / "whole"),
        {**A14B_SIZE, "options": {"learns": learns}},
        algorithm={"name": "nft", "kl_weight": 0.1},
        rollout={"prompts_per_update": 1, "micro_batch": 1},
        optimizer={"learning_rate": 3e-4},
        updates=1,
    )
    whole = prepare(settings)
    (report,) = train(whole)
    expected = lora_state(whole.generator.transformer)

    def in_parts() -> tuple[dict[str, Tensor], float, list[bool]]:
        run = prepare(dataclasses.replace(settings, output=str(tmp_path / "parts")))
        (own,) = train(run)
        pipeline = run.generator.pipeline
        both = [is_sharded(one) for one in (pipeline.transformer, pipeline.transformer_2)]
        return lora_state(run.generator.transformer), own.reward, both

    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    for found in run_on(2, in_parts):
        assert isinstance(found, tuple), found
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
        assert found[1] == pytest.approx(report.reward, abs=1e-6)
        assert found[2] == [True, True]


def test_a_lora_of_other_transformers_is_refused(tmp_path: Path) -> None:
    both = Wan22Generator(build_tiny_a14b(), **A14B_SIZE)
    attach_lora(both.transformer, LoraSettings(rank=2))
    save_lora(both, tmp_path)
    high = Wan22Generator(build_tiny_a14b(), **A14B_SIZE, learns="high")
    message = f"must hold {LORA_FILE}, got {LORA_FILE} and .*; let the same transformers learn"
    with pytest.raises(ValueError, match=message):
        load_lora(high, tmp_path)
    (tmp_path / LORA_FILE).unlink()
    with pytest.raises(ValueError, match=f"must hold {LORA_FILE} and .*, got {SECOND_LORA_FILE}"):
        load_lora(both, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"a {LORA_FILE} and a {SECOND_LORA_FILE}, got"):
        load_lora(both, tmp_path / "nothing")
    assert not tuner_layers(high.transformer)


def test_both_have_a_lora_of_their_own() -> None:
    generator = Wan22Generator(build_tiny_a14b(), **A14B_SIZE)
    assert generator.learning_sigmas == (0.0, math.inf)
    assert list(generator.transformer) == ["high", "low"]
    assert generator.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learns": "all"}, "learns must be one of high, low, both, got all"),
        ({"guidance_scale_2": 0.5}, "guidance_scale_2 must be at least 1 and finite, got 0.5"),
        ({"guidance_scale_2": math.inf}, "guidance_scale_2 must be at least 1 and finite, got inf"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wan22Generator(build_tiny_a14b(), **A14B_SIZE, **options)


@pytest.mark.parametrize("options", [{"learns": "high"}, {"guidance_scale_2": 3.0}])
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be left out for a pipeline with one transformer"):
        Wan22Generator(build_tiny_ti2v(), **TI2V_SIZE, **options)


def test_pipelines_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="one of Wan 2.1; use generator.family=wan"):
        Wan22Generator(build_tiny_wan(), **A14B_SIZE)
    half = build_tiny_a14b()
    half.register_to_config(boundary_ratio=None)
    with pytest.raises(ValueError, match="got boundary_ratio=None and a transformer_2"):
        Wan22Generator(half, **A14B_SIZE)
    with pytest.raises(ValueError, match="height must be a positive multiple of 32, got 16"):
        Wan22Generator(build_tiny_ti2v(), **A14B_SIZE)
