"""From settings to a running loop: what the command line and the examples share.

An output folder holds config.yaml, metrics.jsonl, prompts.json (what is known of each prompt),
checkpoints/step-NNNNNN and, at the end, lora (or tuned, where the transformer's own weights learn);
faults, where losses were not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_rl import processes
from diffusion_rl.algorithms import algorithm
from diffusion_rl.card import card_says, write_card
from diffusion_rl.checkpoint import (
    Snapshot,
    latest_checkpoint,
    random_state,
    read_checkpoint,
    restore,
    save_checkpoint,
    set_random_state,
    take_snapshot,
)
from diffusion_rl.configuration import (
    CONFIG_FILE,
    GeneratorSettings,
    RunSettings,
    save_config,
    to_tree,
)
from diffusion_rl.faults import save_fault
from diffusion_rl.finetune import FinetuneState, StepReport, begin, finetune
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.held_out import HeldOut, build_held_out
from diffusion_rl.memory_errors import explain_out_of_memory
from diffusion_rl.policies import attach_policies, policies_of, trained_parameters
from diffusion_rl.preflight import check_run
from diffusion_rl.prompt_sampling import check_same_prompts, write_statistics
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import Reward, build_rewards, load_callable
from diffusion_rl.run_folder import CHECKPOINTS as CHECKPOINTS  # For callers who look for them.
from diffusion_rl.run_folder import PROMPTS_FILE as PROMPTS_FILE
from diffusion_rl.run_folder import claim
from diffusion_rl.run_lock import release_lock
from diffusion_rl.samples import step_folder, write_samples
from diffusion_rl.sharding import shard, wants_shards
from diffusion_rl.tracking import AccelerateTracker, MetricsFile, flatten
from diffusion_rl.update_memory import attaching_savings
from diffusion_rl.updates import NotFiniteError
from diffusion_rl.weight_files import LORA as LORA  # For callers who look for the result.
from diffusion_rl.weight_files import TUNED, has_result, load_result, save_result
from diffusion_rl.zero import ZeroOptimizer, wants_zero

logger = logging.getLogger(__name__)

FAULTS = "faults"


@dataclass
class Run:
    """A run ready to go (on)."""

    settings: RunSettings
    generator: AbstractVideoGenerator
    """With what learns attached."""
    rewards: list[Reward]
    prompts: list[str]
    embeddings: PromptEmbeddings
    """Of the prompts."""
    state: FinetuneState
    """Where it stands; step 0 in a new run."""
    sample_embeddings: PromptEmbeddings | None = None
    """Of the prompts of the samples, where there are any."""
    held_out: HeldOut | None = None
    """Rewards that measure and never train."""

    @property
    def output(self) -> Path:
        """Folder of the results."""
        return Path(self.settings.output)

    @property
    def result(self) -> Path:
        """Folder of what was learnt, once the run has ended."""
        return self.output / (TUNED if self.settings.full else LORA)

    @property
    def resumed(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self.state.step > 0


def build_generator(
    settings: GeneratorSettings,
    *,
    lora: str | Path | None = None,
    transformer: str | Path | None = None,
) -> AbstractVideoGenerator:
    """Load a generator, and put a saved LoRA or tuned transformers on it if they are given."""
    generator = load_callable(FAMILIES[settings.family].loader)(
        settings.path,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        fps=settings.fps,
        max_sequence_length=settings.max_sequence_length,
        dtype=settings.dtype,
        device=settings.device,
        local_path=settings.local_path,
        revision=settings.revision,
        execution=settings.execution,
        prompt_cache=settings.prompt_cache,
        **settings.options,
    )
    load_result(generator, lora=lora, transformer=transformer)
    return generator


def prepare(
    settings: RunSettings, *, restart: bool = False, keep_text_encoder: bool = False
) -> Run:
    """Load everything a run needs, and the newest checkpoint of its output folder if there is one.

    The processes of a launcher all call this; the first of them alone writes. The output folder is
    this run's from here to the end of `train`, or of the process.

    Args:
        settings: of the run.
        restart: set an earlier run in the output folder aside (it is renamed, never deleted).
        keep_text_encoder: leave it loaded after the prompts are encoded, to encode others.

    Raises:
        ValueError: the output folder belongs to a run of other settings, another process trains in
            it, or its newest checkpoint is damaged.
    """
    processes.start(settings.generator.device)
    check_run(settings)
    with ExitStack() as undo:
        undo.callback(release_lock, settings.output)
        with processes.together("taking the output folder"):
            if processes.is_main():
                claim(settings, restart=restart)
        with processes.together("loading"):
            run = load_run(settings, keep_text_encoder, undo)
        tokens = settings.generator.execution.context_parallel
        processes.form_teams(1 if tokens is None else tokens.size)
        with processes.together("going on"):
            go_on(run)
            if processes.is_main():
                save_config(settings, run.output / CONFIG_FILE)
        undo.pop_all()
    return run


def load_run(settings: RunSettings, keep_text_encoder: bool, undo: ExitStack) -> Run:
    """A new run's parts; what of them holds something open is closed by `undo`."""
    prompts = read_prompts(settings.prompts, settings.prompt_column)
    rewards = build_rewards(settings.rewards, undo)
    generator = build_generator(settings.generator)
    shards = processes.count() > 1 and wants_shards()
    for part in generator.idle if shards else ():
        shard(part)
    if shards and settings.full is not None:
        shard(generator.transformer)
    what = (generator.transformer, settings.learner)
    old = algorithm(settings.algorithm.name).uses_old_policy
    average = settings.optimizer.average_decay > 0
    savings = partial(attaching_savings, *what, old_policy=old, average=average)
    with explain_out_of_memory("attaching what learns", savings):
        attach_policies(*what, old_policy=old, average=average, seed=settings.seed)
    embeddings, shown = generator.encode_prompts(prompts), None
    if settings.samples is not None:
        shown = generator.encode_prompts(settings.samples.prompts)
    held_out = build_held_out(settings.evaluation, settings.prompt_column, generator, undo)
    if not keep_text_encoder:
        generator.release_text_encoder()
    state = begin(generator, settings.finetune_settings())
    if processes.count() > 1 and wants_zero():
        state.optimizer = ZeroOptimizer(state.optimizer)
    if shards and settings.full is None:
        shard(generator.transformer, trained_parameters(generator.transformer))
    return Run(settings, generator, rewards, prompts, embeddings, state, shown, held_out)


def go_on(run: Run) -> None:
    """Put the newest checkpoint back, on every process the same."""
    newest = latest_checkpoint(run.output / CHECKPOINTS)
    if newest is None:
        processes.part_ways(run.settings.seed)
    else:
        check_same_prompts(run.output / PROMPTS_FILE, run.prompts)
        restore(run.generator, run.state, read_checkpoint(newest))
        logger.info("going on from %s", newest)
    steps = processes.gather_objects(run.state.step)
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"output must be on a disk that all processes see, got {run.output}, where they found "
            f"checkpoints of updates {steps}"
        )


def train(run: Run) -> Generator[StepReport]:
    """Run the loop and yield its reports, writing metrics and checkpoints on the way.

    However it ends (done, Ctrl-C, an error in a reward, the caller closing the iterator), the last
    complete update is saved; `prepare` with the same settings goes on from there. Where the
    transformer's own weights learn, that holds between two updates; an error within one goes back
    to the last checkpoint, since so much is not copied after every update.

    Raises:
        NotFiniteError: too many losses or gradients in a row were not finite; the inputs of the
            last are in `faults`, for `replay_fault`.
    """
    settings, main, begun = run.settings, processes.is_main(), run.state.step
    trackers: list[AccelerateTracker] = []
    sinks: list[MetricsFile | AccelerateTracker] = []
    saver = Saver(run)
    loop = (run.generator, run.rewards, run.prompts, settings.finetune_settings())
    reports = finetune(*loop, run.state, run.embeddings, run.held_out)
    try:
        if main:
            trackers += build_trackers(settings)
            sinks += [MetricsFile(run.output, step=run.state.step), *trackers]
        for report in reports:
            # Metrics before anything that a checkpoint is written from: of an update without one
            # the line is dropped on resuming, and a line that is missing never comes back.
            with processes.together("writing metrics"):
                for sink in sinks:
                    sink.write(report)
            dice = processes.gather_objects(random_state())
            with processes.together("copying what learns"):
                saver.note(report, dice)
            with processes.together("writing"):
                if saver.is_due(report.step):
                    saver.save()
                show_samples(run, report.step, trackers)
            yield report
            saver.begin_update()
        leave_result(run, begun)
    except NotFiniteError as error:
        folder = run.output / FAULTS / f"update-{run.state.step + 1:06d}-process-{processes.rank()}"
        save_fault(folder, run.generator, error.inputs, str(error))
        raise NotFiniteError(f"{error}; its inputs are in {folder}", error.inputs) from error
    finally:
        # Each is done whatever the others raise: saving first, the lock last.
        with ExitStack() as rest:
            rest.callback(release_lock, run.output)
            for tracker in trackers:
                rest.callback(tracker.close)
            for reward in (*run.rewards, *(run.held_out.rewards if run.held_out else ())):
                rest.callback(reward.close)
            saver.save()


def leave_result(run: Run, begun: int) -> None:
    """Write what was learnt and its card, unless all was done before and both are there.

    A card that is left alone keeps what was put into it since.

    Args:
        run: at its end.
        begun: update that it went on from.
    """
    cost = (run.state, len(run.prompts))
    # One that was stopped before this may have left those of an earlier update.
    there = has_result(run.generator, run.output) and card_says(run.result, *cost)
    if processes.gather_objects(there)[0] and run.state.step == begun:
        return
    if processes.is_main() or policies_of(run.generator.transformer).split:
        save_result(run.generator, run.output)
    if processes.is_main():
        write_card(run.result, run.settings, *cost)


def build_trackers(settings: RunSettings) -> list[AccelerateTracker]:
    """What the settings name."""
    if not settings.trackers:
        return []
    flat = {key: str(value) for key, value in to_tree(settings).items()}
    output = Path(settings.output)
    return [AccelerateTracker(settings.trackers, output, output.name, flat)]


class Saver:
    """What the first process writes of a run to go on from."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.snapshot: Snapshot | None = None
        self.last: tuple[dict[str, float], list[Any]] | None = None
        in_parts = isinstance(run.state.optimizer, ZeroOptimizer)
        self.of_parts = in_parts or bool(policies_of(run.generator.transformer).split)
        """Whether all processes must copy together."""

    def is_due(self, step: int) -> bool:
        """Whether an update is written to the disk at once."""
        own = self.run.settings
        return step % own.save_every == 0 or step == own.updates

    def note(self, report: StepReport, dice: list[Any]) -> None:
        """Take in an update that is complete."""
        if not processes.is_main() and not self.of_parts:
            return
        numbers = {
            name: float(value)
            for name, value in flatten(report).items()
            if isinstance(value, int | float)
        }
        self.last = (numbers, dice)
        if self.is_due(report.step) or self.run.settings.full is None:
            self.snapshot = take_snapshot(self.run.generator, self.run.state, *self.last)

    def begin_update(self) -> None:
        """From here to the next `note` what learns is not whole."""
        self.last = None

    def save(self) -> None:
        """Write the last complete update that is at hand."""
        if not processes.is_main():
            return
        stale = self.snapshot is None or self.snapshot.step < self.run.state.step
        if self.last is not None and stale and not self.of_parts:
            self.snapshot = take_snapshot(self.run.generator, self.run.state, *self.last)
        if self.snapshot is not None:
            settings = self.run.settings
            save_checkpoint(
                self.run.output / CHECKPOINTS,
                self.snapshot,
                keep=settings.keep,
                best_by=settings.best_by,
            )
            prompts = (self.run.prompts, self.run.state.prompts)
            write_statistics(self.run.output / PROMPTS_FILE, *prompts)


def show_samples(run: Run, step: int, trackers: Sequence[AccelerateTracker]) -> None:
    """Write the samples of an update whose turn it is, and give them to the trackers."""
    settings, embeddings = run.settings.samples, run.sample_embeddings
    if settings is None or embeddings is None or step % settings.every or not processes.is_main():
        return
    folder, options = step_folder(run.output, step), run.settings.rollout
    dice = random_state()
    samples = write_samples(run.generator, run.rewards, settings, embeddings, options, folder)
    set_random_state(dice)  # A reward may have drawn.
    for tracker in trackers:
        tracker.write_videos(
            step, {f"samples/{one.name}": (one.path, one.video) for one in samples}
        )
