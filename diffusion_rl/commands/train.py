"""`train`: the loop with a bar; Ctrl-C saves and says how to go on."""

from __future__ import annotations

import argparse
import logging
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from diffusion_rl import processes
from diffusion_rl.checkpoint import best_checkpoint, latest_checkpoint, read_checkpoint
from diffusion_rl.commands.base import INTERRUPTED, Subparsers, with_local_path
from diffusion_rl.configuration import load_config
from diffusion_rl.finetune import StepReport
from diffusion_rl.launch import CHECKPOINTS, Run, prepare, train
from diffusion_rl.tracking import METRICS_FILE

logger = logging.getLogger("diffusion_rl")


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    training = commands.add_parser("train", parents=[shared], help="run or go on with a YAML")
    training.add_argument("config", help="a YAML like those in configs/rl")
    training.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. updates=20")
    training.add_argument(
        "--restart", action="store_true", help="set an earlier run in the output folder aside"
    )
    training.set_defaults(command=train_command)


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
        if not processes.is_main():
            return INTERRUPTED
        newest = latest_checkpoint(Path(settings.output) / CHECKPOINTS)
        done = read_checkpoint(newest).step if newest else 0
        print(f"\nstopped after update {done} of {settings.updates}; go on with: {again}")
        return INTERRUPTED
    if processes.is_main():
        print(f"{run.result.name}: {run.result}   metrics: {run.output / METRICS_FILE}")
    best_by = settings.best_by
    best = best_checkpoint(run.output / CHECKPOINTS, best_by) if best_by else None
    if best is not None and processes.is_main():
        print(f"best checkpoint by {best_by}: {best}")
    return 0


def train_with_bar(run: Run, *, description: str = "train") -> list[StepReport]:
    """Run the loop to its end behind a progress bar; used by the examples too."""
    done = []
    with (
        closing(train(run)) as reports,
        tqdm(
            total=run.settings.updates,
            initial=run.state.step,
            desc=description,
            disable=not processes.is_main(),
        ) as bar,
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
    if report.skipped_steps:
        parts.append(f"skipped {report.skipped_steps}")
    if report.alarms:
        parts.append("ALARM " + ",".join(report.alarms))
    if report.hacking:
        parts.append("HACKING? " + ",".join(report.hacking))
    parts += [f"{name} {value:.3f} (held out)" for name, value in report.evaluation.items()]
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
    count = processes.count()
    logger.info(
        "%s: %s%s, %d videos and %d optimiser steps per update, %d trainable parameters, "
        "%d prompts, output %s",
        run.settings.algorithm.name,
        start,
        f" on {count} processes" if count > 1 else "",
        videos,
        run.settings.algorithm.inner_steps,
        learning,
        len(run.prompts),
        run.output,
    )
