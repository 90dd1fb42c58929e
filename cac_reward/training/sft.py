"""Learning from written answers, on TRL's SFT trainer with our own lessons and loss.

Axes: B sequences, L tokens, N frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from trl import SFTConfig, SFTTrainer

from cac_reward.training.clips import Skipped
from cac_reward.training.encoding import EncodedLesson, Encoder, known, mean_or_zero
from cac_reward.training.learning import (
    LearningMixin,
    Pace,
    SkippedClips,
    TrainingError,
    training_arguments,
)
from cac_reward.training.lesson_kinds import LESSONS
from cac_reward.training.lessons import ClipInView
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import Pupil
from cac_reward.training.settings import LossSettings, StageSettings
from cac_reward.training.source import LessonSource
from cac_reward.training.stopping import StopRequest

SKIPPED = "skipped"
READ = "clips_read"
SKIPPED_FILE = "skipped_clips.jsonl"


class LessonCollator:
    """Rows of lesson numbers to a batch; runs in the processes that read videos."""

    def __init__(self, source: LessonSource, encoder: Encoder) -> None:
        self.source = source
        self.encoder = encoder

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        encoded = []
        skipped: list[Skipped] = []
        read = 0
        for row in rows:
            drawn = self.source.draw(row["lesson"], self._encode)
            skipped += drawn.skipped
            if drawn.made is not None:
                read += 1
                encoded += drawn.made
        if not encoded:
            last = skipped[-1]
            raise TrainingError(
                f"a batch must have at least one clip that can be read, got none of "
                f"{len(skipped)}, last {last.name}: {last.reason}"
            )
        return {**self.encoder.collate(encoded), SKIPPED: skipped, READ: read}

    def _encode(self, kind: str, seen: ClipInView) -> list[EncodedLesson]:
        return self.encoder.encode(LESSONS[kind].write(seen))


class JudgeSFTTrainer(LearningMixin, SFTTrainer):
    """TRL's trainer with weighted words and the classifier's heads.

    Args:
        stage: the settings.
        pupil: the judge.
        source: the lessons.
        held_out: what it is measured on; None measures nothing.
        stop: who may ask it to stop.
    """

    def __init__(
        self,
        stage: StageSettings,
        pupil: Pupil,
        source: LessonSource,
        held_out: HeldOut | None,
        stop: StopRequest,
    ) -> None:
        self.stage, self.pupil, self.held_out, self.stop = stage, pupil, held_out, stop
        self.skipped = SkippedClips(Path(stage.output) / SKIPPED_FILE, stage.data.max_skipped_share)
        processor = pupil.training_processor()
        captions = stage.loss.caption_tokens if stage.loss.captions > 0 else 0
        encoder = Encoder(processor, pupil.family, stage.loss.decision_words, captions)
        rows = Dataset.from_dict({"lesson": range(len(source))})
        super().__init__(
            model=pupil.model,
            args=SFTConfig(
                **training_arguments(stage, held_out is not None),
                dataloader_num_workers=stage.data.workers,
                dataset_kwargs={"skip_prepare_dataset": True},
                train_sampling_strategy="sequential",
                max_length=None,
            ),
            data_collator=LessonCollator(source, encoder),
            train_dataset=rows,
            # Never read: the held-out clips are judged, not learnt.
            eval_dataset=rows.select(range(1)) if held_out is not None else None,
            processing_class=processor,
            peft_config=pupil.lora,
            callbacks=[Pace(stop)],
        )
        if pupil.heads is not None:
            # An adapter that was just put on has frozen all else.
            pupil.heads.requires_grad_(True)
        # The loss is a mean over a batch, so that the trainer divides it by the accumulated ones.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Weighted cross-entropy of the judge's words, and the heads' losses."""
        self.skipped.count(inputs.pop(READ), inputs.pop(SKIPPED))
        weights = inputs.pop("weights")
        ends, clip_labels = inputs.pop("frame_ends"), inputs.pop("clip_labels")
        frame_labels, captions = inputs.pop("frame_labels"), inputs.pop("frame_captions")
        heads, loss = self.pupil.heads, self.stage.loss
        if heads is not None:
            heads.watch(ends, captions)
        parts: dict[str, Tensor] = {}
        if loss.words > 0:
            labels = inputs["input_ids"].masked_fill(weights == 0, -100)
            outputs = model(**inputs, labels=labels, fused_lm_head=True)
            parts["words"] = mean_or_zero(-outputs.log_probs.float(), weights[:, 1:])
            self._note_decisions(outputs.is_top1, weights[:, 1:])
        else:
            # By its weight of 0 all that learns takes part in every pass, as DDP expects.
            parts["words"] = model(**inputs, logits_to_keep=1).logits.float().mean()
        if heads is not None:
            parts |= head_losses(*heads.take(), frame_labels, clip_labels, loss)
            if heads.caption_loss is not None:
                parts["captions"] = heads.caption_loss
        shares = {name: getattr(loss, name) for name in parts}
        for name, value in parts.items():
            if shares[name] > 0:
                self._metrics["train"][f"loss_{name}"].append(value.detach().item())
        total = sum((shares[name] * value for name, value in parts.items()), torch.zeros(()))
        return (total, {}) if return_outputs else total

    def _note_decisions(self, right: Tensor, weights: Tensor) -> None:
        """Share of the words that decide a verdict that are likeliest, where they are marked."""
        decisive = weights > 1
        if self.stage.loss.decision_words > 1 and decisive.any():
            share = right.float()[decisive].mean().item()
            self._metrics["train"]["decisions_right"].append(share)


def head_losses(
    frames: Tensor, clips: Tensor, frame_labels: Tensor, clip_labels: Tensor, loss: LossSettings
) -> dict[str, Tensor]:
    """Binary cross-entropy over what is known, broken ones weighted.

    Args:
        frames, clips: log-odds [N] and [B].
        frame_labels, clip_labels: 0, 1 or NaN for unknown.
        loss: weights.
    """
    found = {}
    for name, scores, labels in (("frames", frames, frame_labels), ("clip", clips, clip_labels)):
        truth = labels.nan_to_num(0.0)
        weights = known(labels) * (1 + (loss.anomalous_weight - 1) * truth)
        each = binary_cross_entropy_with_logits(scores.float(), truth, reduction="none")
        found[name] = mean_or_zero(each, weights)
    return found
