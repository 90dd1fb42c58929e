"""Learning from rewards for its own answers, on TRL's GRPO trainer.

The judge writes turn 1; where it calls its tool, `inspect`, the dense frames of its windows are
shown to it and it writes turn 2. Both turns are one answer to GRPO, the tool's tokens are masked.
TRL's own tool loop would answer a malformed call with an error and go on, and render Qwen2.5-VL
with another template; a judge at work meets neither, so the turns are taken here, with the words
and the strict parser of inference.

Axes: B answers, in groups to one clip each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from trl import GRPOConfig, GRPOTrainer

from cac_reward.answers import AnswerError, parse_scan_answer, write_tool_call
from cac_reward.questions import Message
from cac_reward.report import TimeWindow
from cac_reward.training.encoding import Encoder
from cac_reward.training.group_rewards import all_failed, combine, tied
from cac_reward.training.learning import LearningMixin, SkippedClips, training_arguments
from cac_reward.training.lesson_kinds import TASKS, open_task, task_of
from cac_reward.training.lessons import ClipInView
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import Pupil
from cac_reward.training.rollouts import (
    JudgedRollout,
    TaskRollout,
    read_rollout,
    read_task_rollout,
)
from cac_reward.training.settings import StageSettings
from cac_reward.training.sft import SKIPPED_FILE
from cac_reward.training.source import LessonSource
from cac_reward.training.stage_rewards import measure
from cac_reward.training.task_answers import Task

logger = logging.getLogger(__name__)


def inspect(windows: list[list[float]]) -> str:
    """The tool's name for TRL; its frames are shown by `JudgeGRPOTrainer` itself."""
    raise NotImplementedError(f"windows {windows} are shown by the trainer")


@dataclass(eq=False)
class Answering:
    """One answer on its way through the turns."""

    seen: ClipInView
    opening: tuple[Message, ...]
    task: Task | None
    """Of a single turn; None for the two turns."""
    prompt_ids: list[int]
    frames: list[Tensor]
    ids: list[int] = field(default_factory=list)
    """Of everything behind the prompt, the tool's turn included."""
    mask: list[int] = field(default_factory=list)
    """1 where the judge itself wrote."""
    texts: list[str] = field(default_factory=list)
    windows: tuple[TimeWindow, ...] = ()


class JudgeGRPOTrainer(LearningMixin, GRPOTrainer):
    """TRL's trainer with the judge's two turns and the stage's rewards.

    Args:
        stage: the settings.
        pupil: the judge.
        source: the questions.
        held_out: what it is measured on; None measures nothing.
        callbacks: of transformers.

    Raises:
        ValueError: If batches do not hold whole groups, or the family's template writes a first
            turn otherwise once there is a second.
    """

    def __init__(
        self,
        stage: StageSettings,
        pupil: Pupil,
        source: LessonSource,
        held_out: HeldOut | None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.stage, self.pupil, self.held_out, self.source = stage, pupil, held_out, source
        self.skipped = SkippedClips(Path(stage.output) / SKIPPED_FILE, stage.data.max_skipped_share)
        processor = pupil.training_processor()
        self.encoder = Encoder(processor, pupil.family)
        self._numbers: list[int] = []
        self._rollouts: list[JudgedRollout | TaskRollout] = []
        never = processor.tokenizer.convert_tokens_to_ids(list(pupil.family.never_written))
        rollout, grpo = stage.rollout, stage.grpo
        rows = Dataset.from_dict(
            {
                "lesson": range(len(source)),
                "prompt": [[{"role": "user", "content": "clip"}]] * len(source),
            }
        )
        super().__init__(
            model=pupil.model,
            reward_funcs=[self._reward],
            args=GRPOConfig(
                **training_arguments(stage, held_out is not None),
                num_generations=rollout.group,
                max_completion_length=rollout.max_answer_tokens,
                temperature=rollout.temperature,
                beta=grpo.kl_weight,
                epsilon=grpo.clip_low,
                epsilon_high=grpo.clip_high,
                num_iterations=grpo.updates_per_rollout,
                loss_type=grpo.loss_type,
                scale_rewards=grpo.scale_rewards,
                shuffle_dataset=False,
                generation_kwargs={"suppress_tokens": never},
                use_vllm=rollout.vllm,
                vllm_mode="colocate",
                vllm_gpu_memory_utilization=rollout.vllm_memory,
            ),
            train_dataset=rows,
            eval_dataset=rows.select(range(1)) if held_out is not None else None,
            processing_class=processor,
            peft_config=pupil.lora,
            callbacks=list(callbacks),
        )
        # TRL then takes pictures from the answers, not from the prompts alone.
        self.tools = [inspect]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._numbers = [row["lesson"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Both turns of every answer, in the form that TRL goes on with."""
        answering = self._open()
        rollout = self.stage.rollout
        for two_turns, most in (
            (True, rollout.max_call_tokens),
            (False, rollout.max_answer_tokens),
        ):
            some = [one for one in answering if (one.task is None) == two_turns]
            if some:
                self._speak(some, most)
        again = [one for one in answering if self._show(one)]
        if again:
            self._speak(again, rollout.max_answer_tokens)
        self._rollouts = [self._read(one) for one in answering]
        mode = "train" if self.model.training else "eval"
        written = sum(sum(one.mask) for one in answering)
        self._metrics[mode]["completions/mean_length"].append(written / len(answering))
        self._metrics[mode]["tools/call_frequency"].append(len(again) / len(answering))
        pictures = [one.frames for one in answering]
        spoken = [
            [{"role": "assistant", "content": text} for text in one.texts] for one in answering
        ]
        return (
            [one.prompt_ids for one in answering],
            [one.ids for one in answering],
            [one.mask for one in answering],
            spoken,
            None,
            {},
            pictures,
            pictures,
        )

    def _open(self) -> list[Answering]:
        """The question of each answer; answers of one group share their clip."""
        known: dict[int, Answering] = {}
        found = []
        for number in self._numbers:
            if number not in known:
                drawn = self.source.draw(number)
                self.skipped.count(int(drawn.seen is not None), drawn.skipped)
                if drawn.seen is None:
                    last = drawn.skipped[-1]
                    raise RuntimeError(
                        f"a question must have a clip that can be read, got none of "
                        f"{len(drawn.skipped)}, last {last.name}: {last.reason}"
                    )
                known[number] = self._ask(drawn.kind, drawn.seen)
            one = known[number]
            frames = list(one.frames)
            found.append(Answering(one.seen, one.opening, one.task, one.prompt_ids, frames))
        return found

    def _ask(self, kind: str, seen: ClipInView) -> Answering:
        """A question, tokenised."""
        task = task_of(kind, seen) if kind in TASKS else None
        _, opening = seen.scan() if task is None else open_task(task, seen)
        tools = seen.view.tools if task is None else ()
        (read,) = self.encoder.renderer.tokenize([opening], [""], tools)
        return Answering(seen, opening, task, read.tokens, read.frames)

    def _speak(self, answering: Sequence[Answering], most: int) -> None:
        """Let the judge write the next turn of each."""
        pictures = [one.frames for one in answering]
        fields = self.encoder.pictures([frame for frames in pictures for frame in frames])
        self.generation_config.max_new_tokens = most
        if self.use_vllm:
            self.vllm_generation.max_completion_length = most
        ids, _ = self._generate_single_turn(
            [one.prompt_ids + one.ids for one in answering],
            [[to_pil_image(one) for one in frames] for frames in pictures]
            if self.use_vllm
            else pictures,
            fields,
            self.num_generations,
            has_tool_images=True,
        )
        for one, new in zip(answering, ids, strict=True):
            one.ids += new
            one.mask += [1] * len(new)
            one.texts.append(self._tokenizer.decode(new, skip_special_tokens=True))

    def _show(self, one: Answering) -> bool:
        """Append the second look that was called for; False where none was."""
        if one.task is not None:
            return False
        ended = bool(one.ids) and one.ids[-1] in self.eos_token_ids
        try:
            one.windows = parse_scan_answer(
                one.texts[0] if ended else "", one.seen.seconds, self.pupil.family.call_format
            )
        except AnswerError:
            return False
        if not one.windows:
            return False
        _, look = one.seen.second_look(one.windows)
        said = write_tool_call(one.windows, self.pupil.family.call_format)
        renderer, tools = self.encoder.renderer, one.seen.view.tools
        conversation = [*one.opening, Message("assistant", (said,)), look]
        before = renderer.render(one.opening, tools) + said + self._tokenizer.eos_token
        whole = renderer.render(conversation, tools)
        if not whole.startswith(before):
            raise ValueError(
                f"judge must keep its first turn as it was written, got a chat template of family "
                f"{self.pupil.family.name} that writes it otherwise before a second turn; train "
                "this family with 'sft'"
            )
        short = self._tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
        new = renderer.expand(short, look.frames)
        one.ids += new
        one.mask += [0] * len(new)
        one.frames += look.frames
        return True

    def _read(self, one: Answering) -> JudgedRollout | TaskRollout:
        if one.task is not None:
            return read_task_rollout(
                one.texts[0],
                one.seen.clip,
                one.task,
                duration_seconds=one.seen.seconds,
                count_tokens=lambda text: len(self._tokenizer(text)["input_ids"]),
            )
        height, width = one.frames[-1].shape[-2:]
        return read_rollout(
            one.texts,
            one.seen.clip,
            duration_seconds=one.seen.seconds,
            box_reader=self.pupil.family.box_reader(height, width),
            call_format=self.pupil.family.call_format,
        )

    def _reward(self, prompts: list[Any], **more: Any) -> list[float | None]:
        """One reward of each answer; None for a group in which nothing can be read."""
        weights = self.stage.rewards
        values = [measure(rollout, list(weights)) for rollout in self._rollouts]
        rewards: list[float | None] = [combine(one, weights) for one in values]
        group = self.num_generations if self.model.training else self.num_generations_eval
        failed = ties = 0
        for first in range(0, len(rewards), group):
            rows = slice(first, first + group)
            if all_failed(self._rollouts[rows]):
                failed += 1
                rewards[rows] = [None] * group
            elif tied([one for one in rewards[rows] if one is not None]):
                ties += 1
        groups = max(1, len(rewards) // group)
        log = more["log_metric"]
        log("groups/failed", failed / groups)
        log("groups/tied", ties / groups)
        log("answers/failed", sum(one.failed for one in self._rollouts) / len(rewards))
        for name in weights:
            present = [one[name] for one in values if one[name] == one[name]]
            if present:
                log(f"rewards/{name}", sum(present) / len(present))
        return rewards


def whole_groups(stage: StageSettings, processes: int) -> None:
    """Refuse batches that would tear groups apart.

    Raises:
        ValueError: If answers of an update are no whole groups.
    """
    answers = stage.batch * stage.accumulation * processes
    if answers % stage.rollout.group:
        raise ValueError(
            f"batch * accumulation * processes must be a multiple of rollout.group "
            f"{stage.rollout.group}, got {stage.batch} * {stage.accumulation} * {processes}"
        )
    if stage.save_every % stage.grpo.updates_per_rollout:
        raise ValueError(
            f"save_every must be a multiple of grpo.updates_per_rollout "
            f"{stage.grpo.updates_per_rollout}, got {stage.save_every}"
        )
