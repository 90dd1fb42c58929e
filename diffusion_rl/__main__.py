"""The command line: python -m diffusion_rl train | sample | evaluate."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from diffusion_rl.before_after import (
    build_samplers,
    compare_sides,
    with_anomaly_rates,
    write_results,
)
from diffusion_rl.checkpoint import latest_checkpoint, read_checkpoint
from diffusion_rl.configuration import RunSettings, load_config, read_prompts
from diffusion_rl.evaluation import (
    Measured,
    audit_judge,
    gather,
    measure_generator,
    statistic_measures,
)
from diffusion_rl.finetune import StepReport
from diffusion_rl.guards import STATISTICS
from diffusion_rl.launch import CHECKPOINTS, CONFIG_FILE, LORA, Run, build_generator, prepare, train
from diffusion_rl.rewards import RewardSettings, build_reward
from diffusion_rl.rollout import sample_videos
from diffusion_rl.tracking import METRICS_FILE, write_video

logger = logging.getLogger("diffusion_rl")

INTERRUPTED = 130
AUDITED = 32
"""Clips of which `evaluate` shows the judge frozen and blurred copies."""
STILL = tuple(name for name in STATISTICS if name != "diversity")
USER_ERRORS = (ValueError, RuntimeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes a list only where it stands in one piece; overrides may also follow options.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*options.overrides, *rest]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Loading one file in a cache makes as much noise as an update; warnings stay.
    for name in ("httpx", "httpcore", "huggingface_hub", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nstopped")
        return INTERRUPTED
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Every command and option."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_rl",
        description="Fine-tune a text-to-video generator with any reward, and measure the change.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--local-path", help="generator folder to read instead of the hub")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")

    training = commands.add_parser("train", parents=[shared], help="run or go on with a YAML")
    training.add_argument("config", help="a YAML like those in configs/rl")
    training.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. updates=20")
    training.add_argument(
        "--restart", action="store_true", help="set an earlier run in the output folder aside"
    )
    training.set_defaults(command=train_command)

    sampling = commands.add_parser("sample", parents=[shared], help="write videos of prompts")
    sampling.add_argument("config", help="a YAML like those in configs/rl, or a run's config.yaml")
    sampling.add_argument("overrides", nargs="*", metavar="key=value")
    sampling.add_argument("--prompts", required=True, help="a text file, one prompt a line")
    sampling.add_argument("--lora", help="folder of a LoRA; without it the base generator")
    sampling.add_argument("--output", default="samples", help="folder of the videos")
    sampling.add_argument("--seed", type=int, default=0, help="of the first video")
    sampling.add_argument("--format", choices=["mp4", "webp"], default="mp4")
    sampling.add_argument("--scale", type=int, default=1, help="enlarge pixel for pixel")
    sampling.set_defaults(command=sample_command)

    evaluation = commands.add_parser(
        "evaluate", parents=[shared], help="compare a LoRA with its base, same prompts and noise"
    )
    evaluation.add_argument("overrides", nargs="*", metavar="key=value")
    evaluation.add_argument(
        "--base", help="a YAML like those in configs/rl; default: the config.yaml beside the LoRA"
    )
    evaluation.add_argument("--lora", required=True, help="folder of the LoRA")
    evaluation.add_argument("--prompts", required=True, help="a text file of held-out prompts")
    evaluation.add_argument("--videos-per-prompt", type=int, default=4, help="at least 1")
    evaluation.add_argument("--seed", type=int, default=0, help="of the first video")
    evaluation.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME=MODULE:CALLABLE",
        help="another reward callable to measure with, e.g. a judge that took no part in training",
    )
    evaluation.add_argument(
        "--clean",
        action="append",
        metavar="NAME",
        help="a measure that is P(clean), counted as broken below 0.5; default: the first reward",
    )
    evaluation.add_argument("--output", default="evaluation", help="folder of the report")
    evaluation.set_defaults(command=evaluate_command)
    return parser


def train_command(options: argparse.Namespace) -> int:
    """`train`: the loop with a bar; Ctrl-C saves and says how to go on."""
    settings = with_local_path(load_config(options.config, options.overrides), options.local_path)
    again = " ".join(
        ["python -m diffusion_rl train", options.config, *options.overrides]
        + (["--local-path", options.local_path] if options.local_path else [])
    )
    try:
        run = prepare(settings, restart=options.restart)
        describe(run)
        train_with_bar(run)
    except KeyboardInterrupt:
        newest = latest_checkpoint(Path(settings.output) / CHECKPOINTS)
        done = read_checkpoint(newest).step if newest else 0
        print(f"\nstopped after update {done} of {settings.updates}; go on with: {again}")
        return INTERRUPTED
    print(f"lora: {run.output / LORA}   metrics: {run.output / METRICS_FILE}")
    return 0


def train_with_bar(run: Run, *, description: str = "train") -> list[StepReport]:
    """Run the loop to its end behind a progress bar; used by the examples too."""
    done = []
    with (
        closing(train(run)) as reports,
        tqdm(total=run.settings.updates, initial=run.state.step, desc=description) as bar,
    ):
        for report in reports:
            done.append(report)
            bar.set_postfix_str(summary_line(report))
            bar.update()
    return done


def summary_line(report: StepReport) -> str:
    """The few numbers to watch."""
    parts = [f"reward {report.reward:.3f}"]
    parts += [f"{name} {level:.0%}" for name, level in report.guards.items()]
    if report.missing_share:
        parts.append(f"unjudged {report.missing_share:.0%}")
    if report.alarms:
        parts.append("ALARM " + ",".join(report.alarms))
    return ", ".join(parts)


def describe(run: Run) -> None:
    """Say what is about to run."""
    options = run.settings.rollout
    videos = options.prompts_per_update * options.videos_per_prompt
    learning = sum(
        parameter.numel()
        for group in run.state.optimizer.param_groups
        for parameter in group["params"]
    )
    start = f"going on after update {run.state.step}" if run.resumed else "a new run"
    logger.info(
        "%s: %s, %d videos and %d optimiser steps per update, %d trainable parameters, "
        "%d prompts, output %s",
        run.settings.algorithm.name,
        start,
        videos,
        run.settings.algorithm.inner_steps,
        learning,
        len(run.prompts),
        run.output,
    )


def sample_command(options: argparse.Namespace) -> int:
    """`sample`: one video for each prompt, with and without a LoRA."""
    settings = with_local_path(load_config(options.config, options.overrides), options.local_path)
    prompts = read_prompts(options.prompts)
    generator = build_generator(settings.generator, lora=options.lora)
    for index, prompt in enumerate(tqdm(prompts, desc="sample")):
        video = sample_videos(
            generator,
            [prompt],
            [options.seed + index],
            num_inference_steps=settings.rollout.num_inference_steps,
            guidance_scale=settings.rollout.guidance_scale,
        )[0]
        path = Path(options.output) / f"{index:04d}.{options.format}"
        write_video(path, video, generator.fps, scale=options.scale)
    print(f"videos: {options.output}")
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    """`evaluate`: base and LoRA measured alike, a table, summary.json and report.html."""
    if options.videos_per_prompt < 1:
        raise ValueError(f"--videos-per-prompt must be at least 1, got {options.videos_per_prompt}")
    config = options.base or Path(options.lora).parent / CONFIG_FILE
    settings = with_local_path(load_config(config, options.overrides), options.local_path)
    prompts = [
        text for text in read_prompts(options.prompts) for _ in range(options.videos_per_prompt)
    ]
    seeds = range(options.seed, options.seed + len(prompts))
    rewards = [build_reward(reward) for reward in (*settings.rewards, *extra_measures(options))]
    measures = {reward.name: reward.function for reward in rewards}
    clean = options.clean or [rewards[0].name]
    generator = build_generator(settings.generator, lora=options.lora)
    samplers = build_samplers(generator, prompts, settings.rollout)
    watched = statistic_measures(*(STATISTICS if options.videos_per_prompt > 1 else STILL))
    sides = {}
    for side, sample in samplers.items():
        with tqdm(total=len(prompts), desc=side) as bar:
            batches = measure_generator(
                sample, measures | watched, prompts, seeds, fps=generator.fps
            )
            sides[side] = with_anomaly_rates(gather(_counted(batches, bar)), clean)
    comparisons, summary = compare_sides(sides, clean)
    some = slice(0, AUDITED)
    audits = {
        name: audit_judge(
            measures[name], sides["base"].videos[some] / 255, prompts[some], fps=generator.fps
        )
        for name in clean
    }
    page = write_results(options.output, sides, comparisons, summary, audits, fps=generator.fps)
    for name, found in comparisons.items():
        low, high = found.difference.low, found.difference.high
        print(f"{name:28} {found.base:8.4f} -> {found.tuned:8.4f}   ({low:+.4f} to {high:+.4f})")
    print(f"report: {page}")
    return 0


def extra_measures(options: argparse.Namespace) -> list[RewardSettings]:
    """Every --measure NAME=MODULE:CALLABLE."""
    found = []
    for text in options.measure:
        name, equals, target = text.partition("=")
        if not (name and equals and target):
            raise ValueError(f"--measure must be NAME=MODULE:CALLABLE, got {text!r}")
        found.append(RewardSettings(name=name, target=target))
    return found


def _counted(batches: Iterable[Measured], bar: tqdm) -> Iterator[Measured]:
    for batch in batches:
        yield batch
        bar.update(len(batch.prompts))


def with_local_path(settings: RunSettings, local_path: str | None) -> RunSettings:
    """Settings whose generator is read from a folder, if one is given."""
    if local_path is None:
        return settings
    generator = dataclasses.replace(settings.generator, local_path=local_path)
    return dataclasses.replace(settings, generator=generator)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End a terminated run as Ctrl-C would: saved."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
