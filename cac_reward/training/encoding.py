"""Lessons as tokens with a weight of loss each, and as padded batches.

Axes: B sequences, L tokens, C channels (3), H height, W width, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cac_reward.judges.families import Family
from cac_reward.judges.rendering import Renderer
from cac_reward.questions import Message
from cac_reward.training.lessons import Lesson, Words

Batch = dict[str, Tensor]
"""What a model's forward takes, and the labels; see `Encoder.collate`."""


@dataclass(frozen=True, eq=False)
class EncodedLesson:
    """One sequence that the model reads."""

    tokens: list[int]
    weights: list[float]
    """Of predicting each token; 0 for what the judge does not say."""
    frames: list[Tensor]
    """[C H W] each, in the order of their places."""
    frame_labels: tuple[float, ...]
    """Of each frame; NaN unknown."""
    clip_label: float
    """NaN unknown."""
    frame_captions: tuple[str, ...] = ()
    """Of each frame; '' where there is none."""


class Encoder:
    """Writes lessons with one family's template and tokenizer.

    Args:
        processor: of the model.
        family: its conventions.
        decision_weight: of tokens that decide a verdict, where other learnt ones weigh 1.
        caption_tokens: how many of the first tokens of each frame's caption are labels; 0 for none.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        decision_weight: float = 1.0,
        caption_tokens: int = 0,
    ) -> None:
        self.renderer = Renderer(processor, family)
        self.decision_weight = decision_weight
        self.caption_tokens = caption_tokens
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.family = family
        self._pad = self.tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self.tokenizer.eos_token_id

    def encode(self, lesson: Lesson) -> list[EncodedLesson]:
        """A lesson as sequences: one, or one for each turn of the judge.

        Several where a template writes the judge's earlier turns otherwise than its last (Qwen3.5
        drops thoughts): each turn is then learnt behind what it will be shown behind.

        Raises:
            ControlTokenError: If a text holds control tokens.
            ValueError: If a frame does not fit the patches.
        """
        if self.caption_tokens:
            self.renderer.check_text("\n".join(lesson.frame_captions))
        said = [i for i, one in enumerate(lesson.messages) if isinstance(one, Words)]
        plain = [
            Message("assistant", (one.text,)) if isinstance(one, Words) else one
            for one in lesson.messages
        ]
        openings = [self.renderer.render(plain[:at], lesson.tools) for at in said]
        self.renderer.render(plain, lesson.tools, answering=False)  # Checks the last turn too.
        whole = all(
            later.startswith(earlier + _words(lesson, at).text + self.tokenizer.eos_token)
            for earlier, later, at in zip(openings, openings[1:], said, strict=False)
        )
        taught = [at for at in said if _words(lesson, at).weights or _words(lesson, at).ends]
        parts = [said] if whole else [[at] for at in taught]
        return [self._encode(lesson, plain, openings, said, part) for part in parts]

    def _encode(
        self,
        lesson: Lesson,
        plain: Sequence[Message],
        openings: Sequence[str],
        said: Sequence[int],
        learnt: Sequence[int],
    ) -> EncodedLesson:
        """One sequence that ends with the last of `learnt` turns."""
        short: list[int] = []
        weights: list[float] = []
        written = ""
        for at in learnt:
            opening = openings[said.index(at)]
            self._add(opening[len(written) :], 0.0, short, weights)
            written = opening
            words = _words(lesson, at)
            last = at == learnt[-1]
            for text, weight in self._pieces(words):
                self._add(text, weight, short, weights)
            written += words.text
            if words.ends or not last:
                short.append(self.tokenizer.eos_token_id)
                weights.append(1.0 if words.ends else 0.0)
                written += self.tokenizer.eos_token
        frames = [frame for message in plain[: learnt[-1]] for frame in message.frames]
        counts = iter([self.renderer.count_tokens(frame) for frame in frames])
        long: list[float] = []
        for token, weight in zip(short, weights, strict=True):
            image = token == self.renderer.image_token_id
            long += [weight] * (next(counts) if image else 1)
        labels = lesson.frame_labels[: len(frames)]
        tokens = self.renderer.expand(short, frames)
        captions = lesson.frame_captions[: len(frames)]
        return EncodedLesson(tokens, long, frames, labels, lesson.clip_label, captions)

    def _pieces(self, words: Words) -> list[tuple[str, float]]:
        """The text of a turn cut where its weight changes."""
        pieces: list[tuple[str, float]] = []
        done = 0
        for start, end, decisive in words.weights:
            pieces.append((words.text[done:start], 0.0))
            pieces.append((words.text[start:end], self.decision_weight if decisive else 1.0))
            done = end
        pieces.append((words.text[done:], 0.0))
        return [piece for piece in pieces if piece[0]]

    def _add(self, text: str, weight: float, tokens: list[int], weights: list[float]) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        weights += [weight] * len(ids)

    def collate(self, lessons: Sequence[EncodedLesson]) -> Batch:
        """Pad to the right.

        Returns:
            input_ids, attention_mask, mm_token_type_ids [B L]; pixel_values and image_grid_thw;
            weights [B L] float; clip_labels [B]; frame_ends [N 2] row and place of the token right
            behind each frame, frame_labels [N].
        """
        length = max(len(one.tokens) for one in lessons)
        ids = torch.full((len(lessons), length), self._pad)
        mask = torch.zeros(len(lessons), length, dtype=torch.long)
        weights = torch.zeros(len(lessons), length)
        ends: list[tuple[int, int]] = []
        for row, one in enumerate(lessons):
            count = len(one.tokens)
            ids[row, :count] = torch.tensor(one.tokens)
            mask[row, :count] = 1
            weights[row, :count] = torch.tensor(one.weights)
            ends += [(row, place) for place in _frame_ends(one, self.renderer)]
        labels = [label for one in lessons for label in one.frame_labels]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.renderer.image_token_id).int() * mask.int(),
            "weights": weights,
            "clip_labels": torch.tensor([one.clip_label for one in lessons]),
            "frame_ends": torch.tensor(ends, dtype=torch.long).reshape(-1, 2),
            "frame_labels": torch.tensor(labels, dtype=torch.float32),
            "frame_captions": self._captions(lessons),
            **self.pictures([frame for one in lessons for frame in one.frames]),
        }

    def _captions(self, lessons: Sequence[EncodedLesson]) -> Tensor:
        """[N caption_tokens] of all frames; -100 behind a caption's end and where there is none."""
        texts = [text for one in lessons for text in one.frame_captions]
        count = sum(len(one.frames) for one in lessons)
        labels = torch.full((count, self.caption_tokens), -100)
        said = [row for row, text in enumerate(texts) if text] if len(texts) == count else []
        if self.caption_tokens and said:
            encoded = self.tokenizer([texts[row] for row in said], add_special_tokens=False)
            for row, tokens in zip(said, encoded["input_ids"], strict=True):
                kept = tokens[: self.caption_tokens]
                labels[row, : len(kept)] = torch.tensor(kept)
        return labels

    def pictures(self, frames: Sequence[Tensor]) -> Batch:
        """Frames [C H W] as the family's image processor gives them; nothing for none."""
        if not frames:
            return {}
        made = self.image_processor(
            images=[frame.float() for frame in frames],
            disable_grouping=False,
            return_tensors="pt",
            **self.family.picture_options,
        )
        return {name: made[name] for name in ("pixel_values", "image_grid_thw")}


def _words(lesson: Lesson, at: int) -> Words:
    words = lesson.messages[at]
    assert isinstance(words, Words)
    return words


def _frame_ends(one: EncodedLesson, renderer: Renderer) -> list[int]:
    """Places right behind the tokens of each frame, where a model has seen all of it."""
    places: list[int] = []
    at = 0
    for frame in one.frames:
        at = one.tokens.index(renderer.image_token_id, at) + renderer.count_tokens(frame)
        places.append(at)
    return places


def known(labels: Tensor) -> Tensor:
    """Which labels are not NaN."""
    return ~labels.isnan()


def mean_or_zero(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean; 0, still with a gradient, where all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp(min=math.ulp(1.0))
