"""Figures of the toy checkpoints: what their model cards and the tests hold them to.

The oracle measures; none of its labels reaches any training. Legend: N videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cac_reward.overlap import window_set_iou
from cac_reward.report import AnomalyReport, TimeWindow
from diffusion_rl.configuration import load_config
from diffusion_rl.evaluation import Measured
from diffusion_rl.launch import build_generator
from diffusion_rl.rewards import Reward, build_reward, judge_videos
from examples.toy_world import oracle
from examples.toy_world.demo_evaluation import (
    ALIGNMENT,
    GUIDANCE,
    JUDGE,
    ORACLE,
    EvaluationSettings,
    build_judges,
    evaluation_prompts,
    fault_rates,
    measure_side,
    outcomes,
    side_summary,
)
from examples.toy_world.training_state import EVALUATION_SEED, frames_to_tensor
from examples.toy_world.world import WorldSettings, render_clip

TRAINING_JUDGE = "cac_training"
"""The judge as the YAML asks for it (fast), beside JUDGE, which is the same one in full mode."""
ORACLE_CLIPS = 2000
RENDERED_CLIPS = 512
SAMPLINGS = {"guided": GUIDANCE, "unguided": 1.0}
"""Name to classifier-free guidance: as the card recommends, and as the demo trains."""


def measure_checkpoints(config: str | Path) -> dict[str, Any]:
    """Everything below, on videos drawn with guidance and on videos drawn without.

    Args:
        config: A YAML such as configs/rl/toy_nft.yaml, whose generator and judge are measured,
            with its number of steps.
    """
    settings = load_config(config)
    generator = build_generator(settings.generator)
    judges = build_judges(settings)
    reward = next(one for one in settings.rewards if one.name == JUDGE)
    judges[TRAINING_JUDGE] = build_reward(reward).function
    options = EvaluationSettings()
    prompts = evaluation_prompts(options, [])
    figures: dict[str, Any] = {}
    for name, scale in SAMPLINGS.items():
        rollout = replace(settings.rollout, guidance_scale=scale)
        measured = measure_side(generator, judges, prompts, options, rollout, name)
        figures[name] = {
            "num_inference_steps": rollout.num_inference_steps,
            "guidance_scale": scale,
            "generator": generator_figures(measured),
            "judge": {
                "full": judge_figures(measured, JUDGE),
                "fast": judge_figures(measured, TRAINING_JUDGE),
                "alignment_auc": alignment_auc(measured),
            },
        }
    autoencoder = generator.pipeline.vae  # type: ignore[attr-defined]
    return {
        **figures,
        "oracle": oracle.error_rates(autoencoder, ORACLE_CLIPS, EVALUATION_SEED),
        "rendered": rendered_figures(judges[JUDGE], autoencoder, RENDERED_CLIPS),
    }


def generator_figures(measured: Measured) -> dict[str, Any]:
    """What the oracle says of the base generator's videos."""
    figures: dict[str, Any] = dict(side_summary(measured))
    figures["faults"] = fault_rates(measured)
    return figures


def judge_figures(measured: Measured, name: str) -> dict[str, float]:
    """How a judge agrees with the oracle on generated videos.

    Args:
        measured: By the oracle and by the judge.
        name: The judge's measure.

    Returns:
        verdict_auc of P(anomalous) against the oracle's verdict; verdict_accuracy at 0.5;
        window_iou, the mean over videos that both call broken of the overlap of their windows;
        unjudged, a share. NaN where there is nothing to compare.
    """
    broken = outcomes(measured)["anomaly_rate_oracle"].numpy()
    score = measured.values[name].numpy()
    judged = ~np.isnan(score)
    said = score[judged] < 0.5
    return {
        "verdict_auc": roc_auc(-score[judged], broken[judged] > 0),
        "verdict_accuracy": float(np.mean(said == (broken[judged] > 0))),
        "window_iou": mean_window_overlap(measured.reports[name], measured.reports[ORACLE]),
        "unjudged": float(np.mean(~judged)),
    }


def alignment_auc(measured: Measured) -> float:
    """ROC-AUC of P(yes) against the oracle's word on whether the prompt was followed."""
    followed = outcomes(measured)["prompt_match"].numpy() > 0
    return roc_auc(measured.values[ALIGNMENT].numpy(), followed)


def rendered_figures(judge: Any, autoencoder: Any, count: int) -> dict[str, float]:
    """How the judge does on rendered clips of the evaluation split, where the truth is known.

    Args:
        judge: Honours the reward contract.
        autoencoder: Whose round trip the clips make first.
        count: Clips; their seeds begin at EVALUATION_SEED.
    """
    world = WorldSettings()
    clips = [render_clip(EVALUATION_SEED + i, world, split="evaluation") for i in range(count)]
    scores: list[float] = []
    for first in range(0, count, 32):
        part = clips[first : first + 32]
        videos = round_trip(autoencoder, [frames_to_tensor(clip.frames) for clip in part])
        prompts = [clip.prompt for clip in part]
        scores += judge_videos(
            [Reward(JUDGE, judge)], videos, prompts, fps=world.fps
        ).score.tolist()
    score, truth = np.array(scores), np.array([bool(clip.faults) for clip in clips])
    judged = ~np.isnan(score)
    return {
        "clips": count,
        "verdict_auc": roc_auc(-score[judged], truth[judged]),
        "verdict_accuracy": float(np.mean((score[judged] < 0.5) == truth[judged])),
    }


def round_trip(autoencoder: Any, videos: Sequence[Tensor]) -> Tensor:
    """Videos [F 3 H W] in [0, 1] encoded and decoded, as [N F 3 H W]."""
    import torch

    with torch.no_grad():
        stacked = torch.stack(list(videos)).transpose(1, 2) * 2 - 1
        latent = autoencoder.encode(stacked).latent_dist.mode()
        decoded = autoencoder.decode(latent).sample.clamp(-1, 1)
    return (decoded.transpose(1, 2) + 1) / 2


def mean_window_overlap(
    judge: Sequence[AnomalyReport], reports: Sequence[oracle.OracleReport]
) -> float:
    """Mean IoU of the windows of videos that both call broken and both have windows for."""
    overlaps = []
    for said, true in zip(judge, reports, strict=True):
        windows = [finding.window for finding in said.findings] or list(said.windows)
        found = [TimeWindow(*finding.window) for finding in true.findings]
        if said.verdict == "anomalous" and true.broken and windows and found:
            overlaps.append(window_set_iou(windows, found))
    return float(np.mean(overlaps)) if overlaps else float("nan")


def roc_auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative; ties count half; NaN without both kinds.

    Example:
        >>> roc_auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
        0.875
    """
    above, below = score[positive], score[~positive]
    if not len(above) or not len(below):
        return float("nan")
    ordered = np.sort(below)
    wins = np.searchsorted(ordered, above, "left") + np.searchsorted(ordered, above, "right")
    return float(wins.sum() / (2 * len(above) * len(below)))


def parameter_count(folder: Path) -> int:
    """Numbers in all safetensors files of a checkpoint folder."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping: it has no iterator
                total += int(np.prod(file.get_slice(name).get_shape()))
    return total


def size_mb(folder: Path) -> float:
    """Size of all files of a folder in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def bars(figures: Mapping[str, Any]) -> list[tuple[str, float, str, bool]]:
    """What the checkpoints must reach: name, figure, rule, reached."""
    made, judge = figures["guided"]["generator"], figures["guided"]["judge"]
    rows = [
        ("oracle's accuracy after the VAE", figures["oracle"]["accuracy"], 0.97, 1.0),
        ("generator's broken share", made["anomaly_rate_oracle"], 0.4, 0.7),
        ("generator's prompt match", made["prompt_match"], 0.85, 1.0),
        ("judge's verdict ROC-AUC", judge["full"]["verdict_auc"], 0.9, 1.0),
        ("judge's windows, IoU", judge["full"]["window_iou"], 0.5, 1.0),
    ]
    return [
        (name, value, f"{low:g} to {high:g}", bool(low <= value <= high))
        for name, value, low, high in rows
    ]
