"""`evaluate`: base, tuned and further generators measured alike; JSON, Markdown and a page."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusion_rl.before_after import (
    AUDITED,
    RATE,
    SIDES,
    Sampler,
    build_samplers,
    compare_sides,
    kept_videos,
    result_tables,
    with_anomaly_rates,
    write_results,
)
from diffusion_rl.card import update_card
from diffusion_rl.commands.base import (
    INTERRUPTED,
    Subparsers,
    add_noise_level,
    measures_named,
    with_local_path,
)
from diffusion_rl.configuration import RunSettings, load_config
from diffusion_rl.evaluation import Measured, audit_judge, gather, statistic_measures
from diffusion_rl.evaluation_parts import EvaluationParts, EvaluationTask, fingerprint
from diffusion_rl.guards import STATISTICS
from diffusion_rl.launch import CONFIG_FILE, build_generator
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rewards import Reward, RewardFunction, RewardSettings, build_rewards
from diffusion_rl.sampling import check_noise_level
from diffusion_rl.vbench import VBenchFolder
from diffusion_rl.weight_files import COMPONENTS

STILL = tuple(name for name in STATISTICS if name != "diversity")


def add_parser(commands: Subparsers, shared: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    evaluation = commands.add_parser(
        "evaluate", parents=[shared], help="compare what a run made with its base, same noise"
    )
    evaluation.add_argument("overrides", nargs="*", metavar="key=value")
    evaluation.add_argument(
        "--base",
        help="a YAML like those in configs/rl; default: the config.yaml beside what is given",
    )
    tuned = evaluation.add_mutually_exclusive_group(required=True)
    tuned.add_argument("--lora", help="folder of the LoRA")
    tuned.add_argument("--transformer", help="folder of a full fine-tuning, a run's `tuned`")
    evaluation.add_argument("--prompts", required=True, help="file of held-out prompts")
    evaluation.add_argument("--videos-per-prompt", type=int, default=4, help="at least 1")
    evaluation.add_argument("--seed", type=int, default=0, help="of the first video")
    evaluation.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME=MODULE:CALLABLE",
        help="another reward callable to measure with, e.g. a judge that took no part in training; "
        "its options go in braces: NAME=MODULE:CALLABLE{path_or_hub_id: FOLDER}",
    )
    evaluation.add_argument(
        "--clean",
        action="append",
        metavar="NAME",
        help="a measure that is P(clean), counted as broken below 0.5; default: the first reward",
    )
    evaluation.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a further generator on the same prompts and noise: a LoRA's folder, a full "
        "fine-tuning's, or a whole pipeline's",
    )
    add_noise_level(evaluation)
    evaluation.add_argument("--output", default="evaluation", help="folder of the report")
    evaluation.add_argument(
        "--batch-size", type=int, default=32, help="videos measured and kept on disk at once"
    )
    evaluation.add_argument(
        "--vbench", metavar="FOLDER", help="also write every video as VBench looks for it"
    )
    evaluation.set_defaults(command=evaluate_command)


def evaluate_command(options: argparse.Namespace) -> int:
    """`evaluate`: measure every side, compare, write the report; Ctrl-C leaves what is measured."""
    for name in ("videos_per_prompt", "batch_size"):
        if getattr(options, name) < 1:
            word = name.replace("_", "-")
            raise ValueError(f"--{word} must be at least 1, got {getattr(options, name)}")
    config = options.base or Path(options.lora or options.transformer).parent / CONFIG_FILE
    settings = with_local_path(load_config(config, options.overrides), options.local_path)
    check_noise_level(options.noise_level, settings.rollout)
    others = further_sides(options.also)
    rewards = measuring_rewards(options, settings)
    with ExitStack() as undo:
        return evaluate(options, settings, others, rewards, build_rewards(rewards, undo))


def evaluate(
    options: argparse.Namespace,
    settings: RunSettings,
    others: dict[str, dict[str, Any]],
    rewards: Sequence[RewardSettings],
    built: Sequence[Reward],
) -> int:
    """Measure with rewards that are at hand; the status of the command."""
    task = build_task(options, settings, built)
    clean = options.clean or [rewards[0].name]
    parts = EvaluationParts(
        options.output, identity_of(options, settings, rewards, others) | {"keep": list(task.keep)}
    )
    try:
        sides, notes, seconds = {}, [], 0.0
        for name, sample in draw_sides(options, settings, others, task.prompts):
            vbench = VBenchFolder(options.vbench, name) if options.vbench else None
            measured, own = measure_side(name, sample, task, parts, vbench)
            sides[name], seconds = with_anomaly_rates(measured, clean), seconds + own
            notes += [f"vbench {name}: {note}" for note in (vbench.close() if vbench else ())]
    except KeyboardInterrupt:
        print("\nstopped; what is measured is kept, and the same command goes on")
        return INTERRUPTED
    comparisons, summary = compare_sides(sides, clean)
    some = slice(0, min(AUDITED, len(task.prompts)))  # The first that are kept.
    audits = {
        name: audit_judge(
            task.measures[name],
            sides["base"].videos[some],
            task.prompts[some],
            fps=task.fps,
            batch_size=task.batch_size,
        )
        for name in clean
    }
    made = len(sides) * len(task.prompts)
    summary |= {"videos_generated": made, "seconds": seconds, "reward_calls": made * len(rewards)}
    summary["noise_level"] = options.noise_level
    summary["audits"] = {
        name: [dataclasses.asdict(row) for row in rows] for name, rows in audits.items()
    }
    tables = result_tables(comparisons, summary, audits)
    page = write_results(options.output, sides, summary, tables, fps=task.fps)
    update_card(
        Path(options.lora or options.transformer), tables, summary_note(task, options.noise_level)
    )
    parts.close()
    for name, found in comparisons[SIDES].items():
        low, high = found.difference.low, found.difference.high
        print(f"{name:28} {found.base:8.4f} -> {found.tuned:8.4f}   ({low:+.4f} to {high:+.4f})")
    print(*notes, f"report: {page}", sep="\n")
    return 0


def summary_note(task: EvaluationTask, noise_level: float) -> str:
    """How the tables of the card were measured."""
    count = len(set(task.prompts))
    drawn = f", drawn with `--noise-level {noise_level:g}`" if noise_level else ""
    return (
        f"{len(task.prompts)} videos a side of {count} prompts, from the same noise{drawn}; "
        "intervals are 95% paired bootstrap intervals over prompts."
    )


def measuring_rewards(options: argparse.Namespace, settings: RunSettings) -> list[RewardSettings]:
    """The run's rewards, those that took no part in training, and what --measure names.

    Raises:
        ValueError: two measures have one name.
    """
    held_out = settings.evaluation.rewards if settings.evaluation else ()
    found = [*settings.rewards, *held_out, *measures_named(options.measure)]
    taken = set(STATISTICS)
    for reward in found:
        if reward.name in taken or reward.name.endswith(RATE):
            raise ValueError(
                f"measures must have names of their own, got {reward.name} twice or taken by "
                f"{', '.join(STATISTICS)} or *{RATE}; rename the --measure, or the reward "
                "in evaluation.rewards"
            )
        taken.add(reward.name)
    return found


def build_task(
    options: argparse.Namespace, settings: RunSettings, rewards: Sequence[Reward]
) -> EvaluationTask:
    """What is drawn and measured, from the command line."""
    each = options.videos_per_prompt
    prompts = [
        text for text in read_prompts(options.prompts, settings.prompt_column) for _ in range(each)
    ]
    judges: dict[str, RewardFunction | Reward] = {reward.name: reward for reward in rewards}
    return EvaluationTask(
        prompts=prompts,
        seeds=range(options.seed, options.seed + len(prompts)),
        measures={**judges, **statistic_measures(*(STATISTICS if each > 1 else STILL))},
        fps=settings.generator.fps,
        batch_size=options.batch_size,
        missing_limit=settings.missing_limit,
        keep=kept_videos(len(prompts)),
    )


def further_sides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every --also NAME=FOLDER as what `build_generator` is told of it.

    Raises:
        ValueError: one has another form, or a name is taken.
        FileNotFoundError: there is no generator in a folder.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name.replace("-", "_").isidentifier() and equals and folder):
            raise ValueError(
                f"--also must be NAME=FOLDER with a name of letters, digits, - and _, got {text!r}"
            )
        if name in (*SIDES, *found):
            raise ValueError(f"--also must have a name of its own, got {name} twice")
        place = Path(folder)
        if any((place / file).is_file() for file in COMPONENTS):
            found[name] = {"lora": folder}
        elif (place / "model_index.json").is_file():
            found[name] = {"path": folder}
        elif any((place / part).is_dir() for part in COMPONENTS.values()):
            found[name] = {"transformer": folder}
        else:
            raise FileNotFoundError(
                f"--also must be the folder of a LoRA, a full fine-tuning or a pipeline, got {text}"
            )
    return found


def draw_sides(
    options: argparse.Namespace,
    settings: RunSettings,
    others: dict[str, dict[str, Any]],
    prompts: Sequence[str],
) -> Iterator[tuple[str, Sampler]]:
    """Name and sampler of each side; a further generator is loaded when its turn comes."""
    generator = build_generator(
        settings.generator, lora=options.lora, transformer=options.transformer
    )
    own_way = (prompts, settings.rollout, options.noise_level)
    yield from build_samplers(generator, *own_way).items()
    del generator
    for name, given in others.items():
        own, path = settings.generator, given.get("path")
        if path is not None:
            own = dataclasses.replace(own, path=path, local_path=None)
        weights = {key: value for key, value in given.items() if key != "path"}
        side = "tuned" if weights else "base"
        yield name, build_samplers(build_generator(own, **weights), *own_way)[side]


def measure_side(
    name: str,
    sample: Sampler,
    task: EvaluationTask,
    parts: EvaluationParts,
    vbench: VBenchFolder | None,
) -> tuple[Measured, float]:
    """All of one side behind a progress bar, and the seconds it took."""
    batches, seconds = [], 0.0
    with tqdm(total=len(task.prompts), desc=name) as bar:
        for batch, own in parts.measure(name, sample, task, vbench):
            batches.append(batch)
            seconds += own
            bar.update(len(batch.prompts))
    return gather(batches), seconds


def identity_of(
    options: argparse.Namespace,
    settings: RunSettings,
    rewards: Sequence[RewardSettings],
    others: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What the values depend on: a stopped evaluation goes on only where all of it is the same."""
    generator = dataclasses.asdict(settings.generator)
    folders = {"tuned": options.lora or options.transformer}
    folders |= {name: next(iter(given.values())) for name, given in others.items()}
    noise = {"noise_level": options.noise_level} if options.noise_level else {}
    return noise | {
        "generator": {key: value for key, value in generator.items() if key != "device"},
        "rollout": dataclasses.asdict(settings.rollout),
        "prompts": read_prompts(options.prompts, settings.prompt_column),
        "draws": [options.videos_per_prompt, options.seed, options.batch_size],
        "rewards": [dataclasses.asdict(reward) for reward in rewards],
        "folders": {name: fingerprint(folder) for name, folder in folders.items()},
    }
