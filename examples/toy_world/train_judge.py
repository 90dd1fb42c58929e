"""Train the toy judge: a stock Qwen3-VL of 1.4M parameters that speaks the two-turn protocol.

Phase 1 teaches single frames and whole clips on rendered videos; phase 2 teaches both turns on
the same kind of clips after the autoencoder, after compression, and after being partly noised and
denoised by the toy generator. Labels come from the renderer alone.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl

from examples.toy_world import judge_bank
from examples.toy_world.annotated_clips import wrong_prompt
from examples.toy_world.base_judge import SETTINGS, number_tokens
from examples.toy_world.judge_folder import build_config, build_processor, build_tokenizer
from examples.toy_world.judge_lessons import (
    DenseLabels,
    Lesson,
    LessonWriter,
    dense_labels,
    frames_to_tensor,
    lesson_random,
    patches,
    protocol_corpus,
)
from examples.toy_world.train_generator import build_optimizers
from examples.toy_world.training_state import (
    load_state,
    render_batch,
    save_state,
    set_rate,
    warmup_cosine,
)
from examples.toy_world.world import Clip, WorldSettings

STAGE = 3
PHASE1_STEPS = 3000
PHASE2_STEPS = 1800
BATCH = 32
PHASE2_SCANS = 22
PHASE2_INSPECTIONS = 16
MUON_RATE = 2e-3
ADAM_RATE = 1e-3
DENSE_WEIGHT = 1.0


def build_judge() -> tuple[Qwen3VLForConditionalGeneration, object]:
    """Model and processor with random weights; (model, processor)."""
    settings = WorldSettings()
    whole = number_tokens(settings.num_frames, settings.fps)
    tokenizer = build_tokenizer(protocol_corpus(), 700, whole)
    config = build_config(
        tokenizer, hidden_size=128, layers=4, heads=4, vision_layers=2, patch_size=8, merge_size=1
    )
    torch.manual_seed(STAGE)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, build_processor(tokenizer, 8, 1)


def attend_by_size(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """Vision attention with one call per picture size instead of one per picture; same numbers."""
    count = hidden_states.shape[0]
    qkv = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).permute(1, 0, 2, 3)
    query, key, value = qkv.unbind(0)
    cos, sin = position_embeddings
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, cos, sin)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    out = torch.empty_like(value)
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        rows = starts[:, None] + torch.arange(length, device=starts.device)
        parts = [t[rows].transpose(1, 2) for t in (query, key, value)]
        mixed = functional.scaled_dot_product_attention(*parts, scale=self.scaling)
        out = out.index_copy(0, rows.flatten(), mixed.transpose(1, 2).flatten(0, 1))
    return self.proj(out.reshape(count, -1))


class DenseHeads(nn.Module):
    """Reads the dense labels off the state behind each frame; used by training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, 6 + 12 + 24 + 7)

    def forward(self, states: Tensor, labels: DenseLabels) -> tuple[Tensor, Tensor]:
        """Mean losses (localisation, fault) over frames; states [N D], labels stacked over N."""
        present, centre, shape, fault = self.read(states).split([6, 12, 24, 7], dim=1)
        seen = torch.from_numpy(labels.present)
        where = torch.from_numpy(labels.centre)
        what = torch.from_numpy(labels.shape)
        on = torch.from_numpy(labels.fault)
        place = (centre.view(-1, 6, 2).sigmoid() - where).abs().sum(2)
        kind = functional.cross_entropy(
            shape.reshape(-1, 4), what.flatten(), reduction="none"
        ).view(-1, 6)
        found = functional.binary_cross_entropy_with_logits(present, seen)
        total = seen.sum().clamp(min=1)
        local = found + 2 * (place * seen).sum() / total + 0.3 * (kind * seen).sum() / total
        return local, functional.binary_cross_entropy_with_logits(fault, on) * 7


@dataclass
class Batch:
    """Padded lessons ready for the model."""

    tokens: Tensor
    mask: Tensor
    weights: Tensor
    pixels: Tensor
    grid: Tensor
    labels: DenseLabels
    image: int
    image_end: int


def collate(lessons: list[Lesson], pictures: list[Tensor], writer: LessonWriter) -> Batch:
    """Right-pad lessons; pictures are each clip's frames [F 3 H W] in [0, 1]."""
    length = max(len(lesson.tokens) for lesson in lessons)
    tokens = torch.full((len(lessons), length), writer.tokenizer.pad_token_id)
    weights = torch.zeros(len(lessons), length)
    mask = torch.zeros(len(lessons), length, dtype=torch.long)
    pixels, grid, labels = [], [], []
    for row, (lesson, frames) in enumerate(zip(lessons, pictures)):
        count = len(lesson.tokens)
        tokens[row, :count] = torch.tensor(lesson.tokens)
        weights[row, :count] = torch.tensor(lesson.weights)
        mask[row, :count] = 1
        truth = dense_labels(lesson.clip)
        order = [frame for frame, _ in lesson.frames]
        labels.append([getattr(truth, k)[order] for k in ("present", "centre", "shape", "fault")])
        for side in dict.fromkeys(side for _, side in lesson.frames):
            chosen = [frame for frame, s in lesson.frames if s == side]
            pixels.append(patches(frames[chosen], side))
            grid += [[1, side // 8, side // 8]] * len(chosen)
    stacked = DenseLabels(*(np.concatenate(part) for part in zip(*labels)))
    return Batch(
        tokens,
        mask,
        weights,
        torch.cat(pixels),
        torch.tensor(grid),
        stacked,
        writer.image,
        writer.image_end,
    )


class JudgeModel(nn.Module):
    """The judge and the heads that only its training has."""

    def __init__(self) -> None:
        super().__init__()
        self.judge, self.processor = build_judge()
        self.heads = DenseHeads(self.judge.config.text_config.hidden_size)
        # On a CPU the fused kernel's backward pass costs more than all matrix products together.
        self.judge.set_attn_implementation("eager")
        for block in self.judge.model.visual.blocks:
            block.attn.forward = attend_by_size.__get__(block.attn)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses: words (weighted cross-entropy), localisation, fault; and decision accuracy."""
        hidden = self.judge.model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            pixel_values=batch.pixels,
            image_grid_thw=batch.grid,
            mm_token_type_ids=(batch.tokens == batch.image).int(),
        ).last_hidden_state
        weights = batch.weights[:, 1:]
        said = weights > 0
        logits = self.judge.lm_head(hidden[:, :-1][said])
        words = functional.cross_entropy(logits, batch.tokens[:, 1:][said], reduction="none")
        weight = weights[said]
        local, fault = self.heads(hidden[batch.tokens == batch.image_end], batch.labels)
        decided = weight > 1
        right = (logits.argmax(1) == batch.tokens[:, 1:][said])[decided].float().mean()
        return {
            "words": (words * weight).sum() / weight.sum(),
            "decision": words[decided].mean(),
            "right": right,
            "local": local,
            "fault": fault,
        }


def write_lessons(
    clips: list[Clip], writer: LessonWriter, salt: int, shares: tuple[float, float, float]
) -> list[Lesson]:
    """A lesson for each clip: scan, alignment or both turns, by `shares`."""
    lessons = []
    for clip in clips:
        random = lesson_random(clip, salt)
        kind = random.choice(3, p=shares)
        if kind == 0:
            lessons.append(writer.scan_lesson(clip))
        elif kind == 1:
            matches = bool(random.random() < 0.5)
            prompt = clip.prompt if matches else wrong_prompt(clip, random)
            lessons.append(writer.alignment_lesson(clip, prompt, matches))
        else:
            lessons.append(writer.inspect_lesson(clip, random))
    return lessons


def compress(frames: np.ndarray, quality: int) -> np.ndarray:
    """Each frame [H W 3] through JPEG and back."""
    out = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(buffer)))
    return np.stack(out)


def textured(
    clip: Clip, decoded: np.ndarray, redrawn: np.ndarray | None, random: np.random.Generator
) -> Tensor:
    """A clip in one of its textures: rendered, decoded, redrawn by the generator, compressed."""
    chance = random.random()
    if chance < 0.15:
        frames = clip.frames
    elif chance < 0.4 or redrawn is None:
        frames = decoded
    else:
        frames = redrawn
    if random.random() < 0.2:
        frames = compress(frames, int(random.integers(40, 91)))
    return frames_to_tensor(frames)


class JudgeTraining:
    """Model, optimisers and place in the schedule, saved and restored as one."""

    def __init__(self, state_file: Path) -> None:
        self.file = state_file
        self.model = JudgeModel()
        self.writer = LessonWriter(self.model.processor.tokenizer)
        self.optimizers = build_optimizers(self.model, MUON_RATE, ADAM_RATE)
        state = load_state(state_file) or {"step": 0, "seconds": 0.0}
        self.step = state["step"]
        if self.step:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        self.began = time.monotonic() - state["seconds"]

    def save(self) -> None:
        """Write everything a later run needs to go on."""
        save_state(
            self.file,
            {
                "step": self.step,
                "seconds": time.monotonic() - self.began,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
        )

    def update(self, parts: list[tuple[list[Lesson], list[Tensor]]]) -> dict[str, float]:
        """One optimiser step over micro-batches of lessons; returns mean losses."""
        totals: dict[str, float] = {}
        for lessons, pictures in parts:
            with torch.autocast("cpu", torch.bfloat16):
                losses = self.model(collate(lessons, pictures, self.writer))
            loss = losses["words"] + DENSE_WEIGHT * (losses["local"] + losses["fault"])
            (loss / len(parts)).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(parts)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return totals


def _run(training: JudgeTraining, steps: int, name: str, parts) -> None:
    """Update until `steps`, with progress; `parts(step)` makes the micro-batches."""
    bar = tqdm(range(training.step, steps), initial=training.step, total=steps, desc=name)
    smooth: dict[str, float] = {}
    for step in bar:
        for key, value in training.update(parts(step)).items():
            smooth[key] = 0.98 * smooth.get(key, value) + 0.02 * value
        if step % 20 == 0:
            bar.set_postfix({key: f"{value:.3f}" for key, value in smooth.items()})
        if training.step % 100 == 0 or training.step == steps:
            training.save()


def train_phase1(state_file: Path, steps: int = PHASE1_STEPS) -> None:
    """Turn 1 and prompt alignment on rendered clips."""
    training = JudgeTraining(state_file)

    def parts(step: int) -> list[tuple[list[Lesson], list[Tensor]]]:
        set_rate(training.optimizers, warmup_cosine(step, steps, 100, floor=0.5))
        clips = render_batch(STAGE, step * BATCH, BATCH)
        shares = (0.75, 0.25, 0.0) if step < steps // 2 else (0.5, 0.5, 0.0)
        lessons = write_lessons(clips, training.writer, 1, shares)
        return [(lessons, [frames_to_tensor(clip.frames) for clip in clips])]

    _run(training, steps, "judge, phase 1", parts)


def train_phase2(state_file: Path, bank_file: Path, steps: int = PHASE2_STEPS) -> None:
    """Both turns and prompt alignment on clips as the generator would have drawn them.

    Goes on from the weights of phase 1 in the same file; `steps` counts phase 2 alone.
    """
    bank = torch.load(bank_file, weights_only=True, mmap=True)
    decoded, redrawn, kept = bank["decoded"], bank["redrawn"], bank["kept"]
    training = JudgeTraining(state_file)

    def part(rows: list[int], salt: int, shares: tuple[float, float, float]):
        clips = [render_batch(judge_bank.STAGE, row, 1)[0] for row in rows]
        pictures = [
            textured(
                clip,
                decoded[row].numpy(),
                redrawn[row].numpy() if kept[row] else None,
                lesson_random(clip, salt + 1),
            )
            for clip, row in zip(clips, rows, strict=True)
        ]
        return write_lessons(clips, training.writer, salt, shares), pictures

    def parts(step: int) -> list[tuple[list[Lesson], list[Tensor]]]:
        done = step - PHASE1_STEPS
        set_rate(training.optimizers, 0.5 * warmup_cosine(done, steps, 20))
        order = np.random.default_rng([STAGE, step]).permutation(len(kept))
        rows = [int(row) for row in order[: PHASE2_SCANS + PHASE2_INSPECTIONS]]
        salt = 2 * step
        return [
            part(rows[:PHASE2_SCANS], salt, (0.7, 0.3, 0.0)),
            part(rows[PHASE2_SCANS:], salt, (0.0, 0.0, 1.0)),
        ]

    _run(training, PHASE1_STEPS + steps, "judge, phase 2", parts)


def save_judge(state_file: Path, folder: Path) -> None:
    """Write the judge as a stock Qwen3-VL folder with its processor and its scan settings."""
    state = load_state(state_file)
    if state is None:
        raise FileNotFoundError(f"judge state must exist, got {state_file}; train it first")
    model = JudgeModel()
    model.load_state_dict(state["model"])
    model.judge.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    SETTINGS.save(folder)
