"""What every generator family must do, checked on a tiny pipeline of its real classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.__main__ import main
from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.configuration import RunSettings, build
from diffusion_rl.finetune import FinetuneSettings, finetune
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.launch import CONFIG_FILE, LORA, build_generator, prepare, train
from diffusion_rl.lora import (
    LoraSettings,
    attach_lora,
    lora_state,
    reference_policy,
    trained_parameters,
)
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_settings import SETTINGS
from diffusion_rl.sampling import sample_videos

PROMPTS = ["a red circle moves left", "the blue square"]
SEEDS = [3, 4]
STEPS = 4

Stock = Callable[[Any, Tensor, float], Tensor]
"""(pipeline, initial latents, guidance) -> videos of PROMPTS in STEPS steps, by diffusers alone."""


def brightness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """The reward of these tests, in [0, 1]."""
    return videos.mean((1, 2, 3, 4))


def sample(generator: AbstractVideoGenerator, guidance: float) -> Tensor:
    """Deterministic videos [2 F C H W] of PROMPTS by our loop."""
    return sample_videos(
        generator, PROMPTS, SEEDS, num_inference_steps=STEPS, guidance_scale=guidance
    )


def check_same_videos(generator: Any, stock: Stock, guidance: float) -> None:
    """Our loop's videos are those that the untouched pipeline makes of the same noise."""
    videos = sample(generator, guidance)
    expected = stock(generator.pipeline, generator.initial_latents(SEEDS), guidance)
    frames = generator.num_frames
    assert videos.shape == (2, frames, 3, generator.height, generator.width)
    torch.testing.assert_close(videos, expected.float(), rtol=0, atol=1e-4)
    # Neither grey nor saturated, nor the same for both prompts, so that agreeing means something.
    assert videos.std() > 1e-2
    assert (videos[0] - videos[1]).abs().max() > 1e-2


def run_settings(
    family: str, folder: Path, output: Path, generator: dict[str, Any], **more: Any
) -> RunSettings:
    """A run of two updates on a pipeline's folder."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    tree: dict[str, Any] = {
        "generator": {"path": str(folder), "family": family, **generator},
        "lora": {"rank": 2, "alpha": 4.0},
        "rollout": {
            "num_inference_steps": STEPS,
            "prompts_per_update": 2,
            "videos_per_prompt": 2,
            "micro_batch": 2,
        },
        "optimizer": {"learning_rate": 1e-2},
        "rewards": [{"name": "bright", "target": f"{__name__}:brightness"}],
        "prompts": str(prompts),
        "updates": 2,
        "output": str(output),
    }
    if ALGORITHMS[more.get("algorithm", {}).get("name", "grpo")].learning_steps == "recorded":
        tree["rollout"]["stochastic_steps"] = 2
    for name, value in more.items():
        merged = isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **value} if merged else value
    return build(tree)


def check_run(settings: RunSettings, pipeline: Any) -> AbstractVideoGenerator:
    """Train, resume, save, load, sample and evaluate by the command line's own paths.

    Returns:
        The generator with the saved LoRA loaded.
    """
    pipeline.save_pretrained(settings.generator.path)
    guidance = settings.rollout.guidance_scale
    run = prepare(settings, keep_text_encoder=True)
    before = [parameter.clone() for parameter in trained_parameters(run.generator.transformer)]
    reports = list(train(run))
    assert [report.step for report in reports] == [1, 2]
    assert all(0 < report.reward < 1 for report in reports)
    assert all(report.grad_norm > 0 for report in reports)
    after = trained_parameters(run.generator.transformer)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    tuned = sample(run.generator, guidance)

    resumed = prepare(settings)
    assert resumed.state.step == 2
    state, expected = (lora_state(one.generator.transformer) for one in (resumed, run))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)

    folder = Path(settings.output) / LORA
    loaded = build_generator(settings.generator, lora=folder)
    assert torch.equal(sample(loaded, guidance), tuned)
    with reference_policy(loaded.transformer):
        base = sample(loaded, guidance)
    assert torch.equal(base, sample(build_generator(settings.generator), guidance))
    assert not torch.equal(base, tuned)
    check_evaluation(settings, folder)
    return loaded


def check_learns(generator: AbstractVideoGenerator, row: str, **changes: Any) -> None:
    """One update of a row of the table moves the adapter, replays being exact."""
    options = {"inner_steps": 1} | ({"history_min_count": 2} if row == "ddpo" else {})
    algorithm = SETTINGS[row](**options)
    sizes = {"num_inference_steps": 3, "stochastic_steps": 1, "videos_per_prompt": 2}
    own_rollout = RolloutSettings(**{**sizes, "prompts_per_update": 1, **changes})
    old = ALGORITHMS[row].uses_old_policy
    parameters = attach_lora(generator.transformer, LoraSettings(rank=2), old_policy=old)
    before = [parameter.clone() for parameter in parameters]
    settings = FinetuneSettings(algorithm=algorithm, rollout=own_rollout, updates=1)
    (report,) = finetune(generator, [Reward("bright", brightness)], PROMPTS, settings)
    assert report.grad_norm > 0
    if ALGORITHMS[row].learning_steps == "recorded":
        assert report.ratio_deviation < 1e-5
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def check_evaluation(settings: RunSettings, lora: Path) -> None:
    """`evaluate` compares the base with the LoRA."""
    report = lora.parent / "evaluation"
    arguments = ["evaluate", "--base", str(lora.parent / CONFIG_FILE), "--lora", str(lora)]
    arguments += ["--prompts", settings.prompts, "--videos-per-prompt", "1"]
    assert main([*arguments, "--output", str(report), "--traceback"]) == 0
    summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))
    assert summary["base"]["bright"] != summary["tuned"]["bright"]
    assert (report / "report.html").is_file()


def check_stock_loads(
    generator: AbstractVideoGenerator, load: Callable[[], Any], stock: Stock, guidance: float
) -> None:
    """What diffusers loads makes the videos that our loop makes with the LoRA on.

    Args:
        generator: with a trained LoRA.
        load: a fresh pipeline with the saved LoRA loaded by diffusers.
        stock: see `Stock`.
        guidance: of both.
    """
    expected = stock(load(), generator.initial_latents(SEEDS), guidance)
    torch.testing.assert_close(sample(generator, guidance), expected.float(), rtol=0, atol=1e-4)


def adapted(generator: AbstractVideoGenerator, settings: RunSettings) -> list[str]:
    """Names of the layers that a run's LoRA adapts; the generator must have none yet."""
    attach_lora(generator.transformer, settings.lora)
    names = lora_state(generator.transformer)
    return sorted({name.split(".lora_")[0] for name in names})
