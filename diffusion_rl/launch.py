"""From settings to a running loop: what the command line and the examples share.

An output folder holds config.yaml, metrics.jsonl, checkpoints/step-NNNNNN and, at the end, lora (or
tuned, where the transformer's own weights learn); faults, where losses were not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffusion_rl import processes
from diffusion_rl.algorithms import algorithm
from diffusion_rl.checkpoint import (
    latest_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
    take_snapshot,
)
from diffusion_rl.configuration import (
    CONFIG_FILE,
    GeneratorSettings,
    RunSettings,
    build,
    save_config,
    to_tree,
)
from diffusion_rl.faults import save_fault
from diffusion_rl.finetune import FinetuneState, StepReport, begin, finetune
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.policies import attach_policies
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import Reward, build_reward, load_callable
from diffusion_rl.tracking import AccelerateTracker, MetricsFile
from diffusion_rl.updates import NotFiniteError
from diffusion_rl.weight_files import LORA as LORA  # For callers who look for the result.
from diffusion_rl.weight_files import TUNED, load_result, save_result

logger = logging.getLogger(__name__)

CHECKPOINTS, FAULTS = "checkpoints", "faults"
# What may differ when a run goes on; the rest would make it another run.
MAY_CHANGE = (
    "updates",
    "save_every",
    "trackers",
    "optimizer",
    "missing_limit",
    "generator.device",
    "generator.local_path",
    "generator.prompt_cache",
    "generator.execution.gradient_checkpointing",
    "generator.execution.offload",
    "rollout.micro_batch",
    "rollout.update_micro_batch",
)
MUST_STAY = ("optimizer.name",)
"""Of those the exceptions: the state of one optimiser is none of another's."""


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

    Args:
        settings: of the run.
        restart: set an earlier run in the output folder aside (it is renamed, never deleted).
        keep_text_encoder: leave it loaded after the prompts are encoded, to encode others.

    Raises:
        ValueError: the output folder belongs to a run of other settings, or its newest checkpoint
            is damaged.
    """
    output = Path(settings.output)
    if restart and output.exists():
        set_aside(output)
    check_same_run(settings)
    prompts = read_prompts(settings.prompts, settings.prompt_column)
    rewards = [build_reward(reward) for reward in settings.rewards]
    generator = build_generator(settings.generator)
    attach_policies(
        generator.transformer,
        settings.learner,
        old_policy=algorithm(settings.algorithm.name).uses_old_policy,
        average=settings.optimizer.average_decay > 0,
        seed=settings.seed,
    )
    embeddings = generator.encode_prompts(prompts)
    if not keep_text_encoder:
        generator.release_text_encoder()
    state = begin(generator, settings.finetune_settings())
    newest = latest_checkpoint(output / CHECKPOINTS)
    if newest is not None:
        restore(generator, state, read_checkpoint(newest))
        logger.info("going on from %s", newest)
    save_config(settings, output / CONFIG_FILE)
    return Run(settings, generator, rewards, prompts, embeddings, state)


def train(run: Run) -> Generator[StepReport]:
    """Run the loop and yield its reports, writing metrics and checkpoints on the way.

    However it ends (done, Ctrl-C, an error in a reward, the caller closing the iterator), the last
    complete update is saved; `prepare` with the same settings goes on from there.

    Raises:
        NotFiniteError: too many losses or gradients in a row were not finite; the inputs of the
            last are in `faults`, for `replay_fault`.
    """
    settings, output = run.settings, run.output
    metrics = MetricsFile(output, step=run.state.step)
    trackers = []
    if settings.trackers:
        flat = {key: str(value) for key, value in to_tree(settings).items()}
        trackers.append(AccelerateTracker(settings.trackers, output, output.name, flat))
    snapshot = take_snapshot(run.generator, run.state)
    reports = finetune(
        run.generator,
        run.rewards,
        run.prompts,
        settings.finetune_settings(),
        run.state,
        run.embeddings,
    )
    try:
        for report in reports:
            # Metrics first: of an update without a checkpoint the line is dropped on resuming.
            metrics.write(report)
            for tracker in trackers:
                tracker.write(report)
            snapshot = take_snapshot(run.generator, run.state)
            if report.step % settings.save_every == 0:
                save_checkpoint(output / CHECKPOINTS, snapshot)
            yield report
        save_result(run.generator, output)
    except NotFiniteError as error:
        folder = output / FAULTS / f"update-{run.state.step + 1:06d}-process-{processes.rank()}"
        save_fault(folder, run.generator, error.inputs, str(error))
        raise NotFiniteError(f"{error}; its inputs are in {folder}", error.inputs) from error
    finally:
        if snapshot.step:
            save_checkpoint(output / CHECKPOINTS, snapshot)
        for reward in run.rewards:
            reward.close()
        for tracker in trackers:
            tracker.close()


def set_aside(output: Path) -> Path:
    """Rename an output folder to the first free `<name>.previous-N`."""
    number = 1
    while (target := output.with_name(f"{output.name}.previous-{number}")).exists():
        number += 1
    output.rename(target)
    logger.info("the earlier run is kept in %s", target)
    return target


def check_same_run(settings: RunSettings) -> None:
    """Refuse to go on from checkpoints that other settings made.

    Raises:
        ValueError: names the first difference and the ways out.
    """
    output = Path(settings.output)
    if latest_checkpoint(output / CHECKPOINTS) is None:
        return
    if not (output / CONFIG_FILE).is_file():
        raise ValueError(
            f"output must hold a {CONFIG_FILE} beside its checkpoints, got none in {output}; put "
            "it back, or --restart to set the earlier run aside"
        )
    earlier = to_tree(build(OmegaConf.to_container(OmegaConf.load(output / CONFIG_FILE))))
    for path, before, now in differences(earlier, to_tree(settings)):
        free = any(path == one or path.startswith(f"{one}.") for one in MAY_CHANGE)
        if not free or path in MUST_STAY:
            raise ValueError(
                f"output must be a new folder or hold a run of the same settings, got {output} "
                f"made with {path}={before}, now {now}; choose another output, or --restart to "
                "set the earlier run aside"
            )


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place where two trees differ: its path and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            place = f"{path}.{key}" if path else key
            yield from differences(before.get(key), now.get(key), place)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif before != now:
        yield path, before, now
