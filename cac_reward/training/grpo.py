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
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torchvision.transforms.functional import to_pil_image
from trl import GRPOConfig, GRPOTrainer

from cac_reward.answers import AnswerError, parse_scan_answer, write_tool_call
from cac_reward.questions import Message
from cac_reward.training.answering import CUT_OFF, Answering
from cac_reward.training.encoding import Encoder
from cac_reward.training.group_rewards import (
    SUMMED_LOSSES,
    all_failed,
    combine,
    only_moving,
    tied,
)
from cac_reward.training.learning import (
    LearningMixin,
    Pace,
    SkippedClips,
    TrainingError,
    training_arguments,
)
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
from cac_reward.training.stopping import StopRequest

logging.getLogger("trl.trainer.grpo_trainer").addFilter(
    # It would print the conversation of each group in which nothing can be read; we count them.
    lambda record: "All reward functions returned None" not in record.getMessage()
)


def inspect(windows: list[list[float]]) -> str:
    """The tool's name for TRL; its frames are shown by `JudgeGRPOTrainer` itself."""
    raise NotImplementedError(f"windows {windows} are shown by the trainer")


class JudgeGRPOTrainer(LearningMixin, GRPOTrainer):
    """TRL's trainer with the judge's two turns and the stage's rewards.

    Args:
        stage: the settings.
        pupil: the judge.
        source: the questions.
        held_out: what it is measured on; None measures nothing.
        stop: who may ask it to stop.

    Raises:
        ImportError: If vLLM is asked for and not installed.
        ValueError: While it trains, if the family's template writes a first turn otherwise once
            there is a second.
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
        self.source = source
        check_engine(stage.rollout.vllm)
        self.skipped = SkippedClips(Path(stage.output) / SKIPPED_FILE, stage.data.max_skipped_share)
        processor = pupil.training_processor()
        self.encoder = Encoder(processor, pupil.family)
        self._numbers: list[int] = []
        self._rollouts: list[JudgedRollout | TaskRollout] = []
        self._in_failed_group: list[bool] = []
        self._in_tied_group: list[bool] = []
        rollout, grpo = stage.rollout, stage.grpo
        rows = Dataset.from_dict(
            {
                "lesson": range(len(source)),
                "prompt": [[{"role": "user", "content": "clip"}]] * len(source),
            }
        )
        super().__init__(
            model=pupil.model,
            reward_funcs=[self.combined],
            args=GRPOConfig(
                **training_arguments(stage, held_out is not None),
                # Videos are read where the questions are asked; rows are only their numbers.
                dataloader_num_workers=0,
                per_device_eval_batch_size=rollout.group,
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
                generation_kwargs=_never_written(processor, pupil, rollout.vllm),
                log_multimodal=False,
                use_vllm=rollout.vllm,
                vllm_mode="colocate",
                vllm_gpu_memory_utilization=rollout.vllm_memory,
            ),
            train_dataset=rows,
            eval_dataset=rows.select(range(1)) if held_out is not None else None,
            processing_class=processor,
            peft_config=pupil.lora,
            callbacks=[Pace(stop, grpo.updates_per_rollout)],
        )
        # TRL then takes pictures from the answers, not from the prompts alone.
        self.tools = [inspect]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._numbers = [row["lesson"] for row in inputs]
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # Without an advantage the divergence from the reference would still pull.
        scored["tool_mask"][self._in_failed_group] = 0
        # Its means in float32 leave 1e-4 of a tie, which the optimiser would make a step of.
        scored["advantages"][self._in_tied_group] = 0
        return scored

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        """TRL's, of the answers that move something; all of them move the routers of experts."""
        if not self.beta and not self.aux_loss_enabled and self.loss_type in SUMMED_LOSSES:
            inputs = only_moving(inputs)
        return super().compute_loss(model, inputs, *more, **named)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Both turns of every answer, in the form that TRL goes on with."""
        answering = self._open()
        rollout = self.stage.rollout
        two = [one for one in answering if one.task is None]
        self._speak(two, rollout.max_call_tokens)
        self._speak([one for one in answering if one.task], rollout.max_answer_tokens)
        again = [one for one in two if self._show(one)]
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
            [one.log_probs for one in answering] if self.use_vllm else None,
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
                drawn = self.source.draw(number, self._ask)
                self.skipped.count(int(drawn.seen is not None), drawn.skipped)
                if drawn.seen is None:
                    last = drawn.skipped[-1]
                    raise TrainingError(
                        f"a question must have a clip that can be read, got none of "
                        f"{len(drawn.skipped)}, last {last.name}: {last.reason}"
                    )
                known[number] = drawn.made
            one = known[number]
            frames = list(one.frames)
            found.append(Answering(one.seen, one.opening, one.task, one.prompt_ids, frames))
        self._example = known[self._numbers[0]]
        return found

    def _ask(self, kind: str, seen: ClipInView) -> Answering:
        """A question, tokenised."""
        task = task_of(kind, seen) if kind in TASKS else None
        _, opening = seen.scan() if task is None else open_task(task, seen)
        tools = seen.view.tools if task is None else ()
        (read,) = self.encoder.renderer.tokenize([opening], [""], tools)
        return Answering(seen, opening, task, read.tokens, read.frames)

    def _speak(self, answering: Sequence[Answering], most: int) -> None:
        """Let the judge write the next turn of each; all processes must call together."""
        if not max(gather_object([len(answering)])):
            return
        # Sharded weights come together layer by layer: who has nothing to write walks along.
        walks = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not answering and not walks:
            return
        writing = answering or [self._example]
        pictures = [one.frames for one in writing]
        fields = self.encoder.pictures([frame for frames in pictures for frame in frames])
        self.generation_config.max_new_tokens = most if answering else 1
        if self.use_vllm:
            self.vllm_generation.max_completion_length = most
        ids, log_probs = self._generate_single_turn(
            [one.prompt_ids + one.ids for one in writing],
            [[to_pil_image(one) for one in frames] for frames in pictures]
            if self.use_vllm
            else pictures,
            fields,
            self.num_generations,
            has_tool_images=True,
        )
        for row, one in enumerate(answering):
            text = self._tokenizer.decode(ids[row], skip_special_tokens=True)
            if not ids[row] or ids[row][-1] not in self.eos_token_ids:
                text += CUT_OFF
            one.write(ids[row], log_probs[row] if log_probs else None, text)

    def _show(self, one: Answering) -> bool:
        """Append the second look that was called for; False where none was."""
        if one.task is not None:
            return False
        try:
            one.windows = parse_scan_answer(
                one.texts[0], one.seen.seconds, self.pupil.family.call_format
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
        one.read(new, look.frames, by_engine=self.use_vllm)
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

    def combined(self, prompts: list[Any], **more: Any) -> list[float | None]:
        """One reward of each answer; None for a group in which nothing can be read.

        The answers of one group may lie with several processes.
        """
        weights = self.stage.rewards
        values = [measure(rollout, list(weights)) for rollout in self._rollouts]
        own = [combine(one, weights) for one in values]
        everyones = gather_object(list(zip(own, self._rollouts, strict=True)))
        group = self.num_generations if self.model.training else self.num_generations_eval
        rewards: list[float | None] = []
        in_tie: list[bool] = []
        failed = 0
        for first in range(0, len(everyones), group):
            together = everyones[first : first + group]
            some = [reward for reward, _ in together]
            nothing = all_failed([rollout for _, rollout in together])
            failed += nothing
            in_tie += [not nothing and tied(some)] * group
            rewards += [None] * group if nothing else some
        groups = len(everyones) // group
        log = more["log_metric"]
        log("groups/failed", failed / groups)
        log("groups/tied", sum(in_tie) / len(in_tie))
        log("answers/failed", sum(one.failed for one in self._rollouts) / len(own))
        for name in weights:
            present = [one[name] for one in values if not math.isnan(one[name])]
            if present:
                log(f"rewards/{name}", sum(present) / len(present))
        first = self.accelerator.process_index * len(own)
        self._in_tied_group = in_tie[first : first + len(own)]
        rewards = rewards[first : first + len(own)]
        self._in_failed_group = [reward is None for reward in rewards]
        return rewards


def _never_written(processor: Any, pupil: Pupil, by_vllm: bool) -> dict[str, Any]:
    """How transformers, or vLLM, is told not to draw the tokens that stand for pictures."""
    ids = processor.tokenizer.convert_tokens_to_ids(list(pupil.family.never_written))
    return {"logit_bias": dict.fromkeys(ids, -100.0)} if by_vllm else {"suppress_tokens": ids}


def check_engine(vllm: bool) -> None:
    """Raises ImportError where vLLM is to draw answers and is not installed."""
    if vllm and find_spec("vllm") is None:
        raise ImportError(
            "rollout.vllm needs vllm; install it with: pip install 'trl[vllm]', or leave it out"
        )


def count_questions(stage: StageSettings, processes: int) -> int:
    """How many questions a stage asks: groups of each set of answers, sets for its updates.

    Raises:
        ValueError: If batches would tear groups apart, or a checkpoint a set of answers.
    """
    answers = stage.batch * stage.batches(processes) * processes
    group, every = stage.rollout.group, stage.grpo.updates_per_rollout
    if answers % group and stage.per_update is not None:
        raise ValueError(
            f"per_update must be a multiple of rollout.group {group}, got {answers}; set "
            f"per_update={-(-answers // group) * group}"
        )
    if answers % group:
        raise ValueError(
            f"batch * accumulation * processes must be a multiple of rollout.group {group}, got "
            f"{stage.batch} * {stage.accumulation} * {processes}"
        )
    for name, value in (
        ("save_every", stage.save_every),
        ("evaluation.every", stage.evaluation.every),
    ):
        if value % every:
            raise ValueError(
                f"{name} must be a multiple of grpo.updates_per_rollout {every}, got {value}; a "
                "checkpoint does not hold the answers between"
            )
    return -(-stage.updates // every) * (answers // group)
