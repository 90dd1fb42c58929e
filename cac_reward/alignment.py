"""Prompt alignment as a reward of its own: P(yes) that a clip shows what its prompt says.

Axes: B videos, F frames, H height, W width.

Source:
    The idea of reading a generative model's P(yes) is VQAScore's, arXiv:2404.01291.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cac_reward.frames import frame_times
from cac_reward.inputs import check_prompts, check_videos, show_scan_frames
from cac_reward.judges.base import AbstractJudge
from cac_reward.questions import ALIGNMENT_CHOICES, alignment_message


class PromptAlignment:
    """The reward: P(yes) to "does this clip show: ...?" after the scan frames.

    Args:
        judge: who looks; the same one as the anomaly scorer's, or another.
        clips_at_once: clips looked at together; bounds the memory.
    """

    def __init__(self, judge: AbstractJudge, *, clips_at_once: int = 16) -> None:
        if clips_at_once < 1:
            raise ValueError(f"clips_at_once must be at least 1, got {clips_at_once}")
        self.judge = judge
        self.clips_at_once = clips_at_once

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        revision: str | None = None,
        base: str | Path | None = None,
        quantization: str | None = None,
    ) -> PromptAlignment:
        """Load a judge from a folder or the hub; arguments as for `LocalJudge.from_pretrained`.

        Judges loaded twice from the same files share their weights.
        """
        from cac_reward.judges.local import LocalJudge

        return cls(
            LocalJudge.from_pretrained(
                path_or_hub_id,
                device=device,
                dtype=dtype,
                attention=attention,
                revision=revision,
                base=base,
                quantization=quantization,
            )
        )

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> Tensor:
        """Score a batch of videos by what they show.

        Args:
            videos: [B F 3 H W] float in [0, 1], at least two frames.
            prompts: What each should show; reserved tags are stripped.
            fps: Frames per second of the videos.

        Returns:
            [B] float32 in [0, 1], P(yes).

        Raises:
            ValueError: If layout, range, rate or the prompts are wrong.
        """
        check_videos(videos, fps)
        check_prompts(prompts, len(videos))
        wording = self.judge.settings.wording
        scores = [torch.empty(0)]
        for start in range(0, len(videos), self.clips_at_once):
            conversations = []
            for video, prompt in zip(
                videos[start : start + self.clips_at_once],
                prompts[start : start + self.clips_at_once],
                strict=True,
            ):
                chosen, frames = show_scan_frames(self.judge, video.detach(), fps)
                times = frame_times(chosen, fps)
                conversations.append(alignment_message(frames, times, prompt, wording))
            log_probs = self.judge.choice_log_probs(conversations, choices=ALIGNMENT_CHOICES)
            scores.append(self.judge.probabilities(log_probs)[:, 0])
        return torch.cat(scores)
