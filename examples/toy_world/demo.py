"""make demo: train the toy generator on the CaC reward, and show that it breaks less often.

Everything lands in one folder (runs/demo): lora/, metrics.jsonl, config.yaml, checkpoints/,
summary.json and report.html. Ctrl-C loses nothing; the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusion_rl.checkpoint import latest_checkpoint
from diffusion_rl.commands.base import INTERRUPTED, USER_ERRORS
from diffusion_rl.commands.train import describe, train_with_bar
from diffusion_rl.configuration import RunSettings, build, load_config, to_tree
from diffusion_rl.launch import (
    CHECKPOINTS,
    CONFIG_FILE,
    LORA,
    prepare,
)
from diffusion_rl.lora_files import save_lora
from diffusion_rl.prompts import read_prompts
from diffusion_rl.run_folder import MAY_CHANGE, differences, set_aside
from examples.toy_world.demo_evaluation import (
    EvaluationSettings,
    build_judges,
    evaluate_run,
    evaluation_prompts,
)
from examples.toy_world.demo_report import (
    build_summary,
    console_table,
    save_summary,
    write_demo_page,
)
from examples.toy_world.stored_run import load_stored_run

logger = logging.getLogger("diffusion_rl")

CONFIGS = {"nft": "configs/rl/toy_nft.yaml", "grpo": "configs/rl/toy_grpo.yaml"}
"""What each row of the table of algorithms is run with; the first is the default."""
QUIET = (
    *("cac_reward", "diffusion_rl.guards", "diffusion_rl.rewards"),
    *("diffusers", "transformers", "huggingface_hub", "httpx", "httpcore"),
)
"""Loggers that warn of single videos, or of every file they read."""
COMMAND = "python -m examples.toy_world.demo"
SUMMARY = "summary.json"
UNGUARDED = "unguarded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_quiet()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with logging_redirect_tqdm():
            run_demo(options)
    except KeyboardInterrupt:
        print(f"\n{where_it_stopped(options)}; go on with: {again(given)}")
        return INTERRUPTED
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def keep_quiet() -> None:
    """Leave the screen to the demo's own bars, which count alarms and videos not judged."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """Every option."""
    sizes = EvaluationSettings()
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the training (default 0)")
    parser.add_argument("--updates", type=int, help="length of the training (default: the YAML's)")
    parser.add_argument("--algorithm", choices=list(CONFIGS), default=next(iter(CONFIGS)))
    parser.add_argument("--config", help="another YAML than the algorithm's in configs/rl")
    parser.add_argument("--output", default="runs/demo", help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="set an earlier run aside")
    parser.add_argument("--prompts", default=sizes.prompts, help="file of held-out prompts")
    parser.add_argument(
        "--videos-per-prompt", type=int, default=sizes.videos_per_prompt, help="in the evaluation"
    )
    parser.add_argument(
        "--oracle-clips", type=int, default=sizes.oracle_clips, help="to measure the oracle on"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def run_demo(options: argparse.Namespace) -> None:
    """Train (or go on), evaluate, write the report."""
    began = time.monotonic()
    settings = demo_settings(options)
    evaluation_settings = EvaluationSettings(
        prompts=options.prompts,
        videos_per_prompt=options.videos_per_prompt,
        oracle_clips=options.oracle_clips,
    )
    check_checkpoints(settings)
    # Everything that could fail after an hour of training is tried before it.
    prompts = evaluation_prompts(evaluation_settings, read_prompts(settings.prompts))
    build_judges(settings)
    other = next(name for name in CONFIGS if name != settings.algorithm.name)
    stored = {name: load_stored_run(name) for name in (UNGUARDED, other)}
    make_room(settings, options.fresh)

    print("loading generator and judge")
    run = prepare(settings, keep_text_encoder=True)
    describe(run)
    left = max(0, settings.updates - run.state.step)
    print(f"1/3 training ({left} updates to go; Ctrl-C saves)")
    if left:
        train_with_bar(run)
    else:
        save_lora(run.generator, run.output / LORA)
    videos = len(prompts) * evaluation_settings.videos_per_prompt
    print(f"2/3 evaluation ({videos} videos before and {videos} after, same noise)")
    evaluation = evaluate_run(run, prompts, evaluation_settings)
    print("3/3 report")
    summary = build_summary(run, evaluation)
    report = write_demo_page(run, evaluation, summary, stored)
    # Last: its presence says that the run is complete.
    save_summary(summary, run.output / SUMMARY)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{console_table(evaluation)}\n")
    print(f"{headline(summary)} ({minutes:.1f} minutes, {summary['peak_memory_mb']:.0f} MB)")
    print(f"report: {report}")


def demo_settings(options: argparse.Namespace) -> RunSettings:
    """The YAML with what the command line says."""
    overrides = [f"seed={options.seed}", f"output={options.output}"]
    if options.updates is not None:
        overrides.append(f"updates={options.updates}")
    return load_config(options.config or CONFIGS[options.algorithm], overrides)


def check_checkpoints(settings: RunSettings) -> None:
    """Refuse to start without the files the demo needs, and say how to get them.

    Raises:
        FileNotFoundError: Names the first one missing.
    """
    judges = [reward.options.get("path_or_hub_id") for reward in settings.rewards]
    places = [(settings.generator.path, "model_index.json")]
    places += [(str(judge), "config.json") for judge in judges if judge is not None]
    for folder, file in places:
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(
                f"{folder} must be a folder with a {file}, got none under {Path.cwd()}; run the "
                "demo from the root of the repository, or make the checkpoints with: "
                "make toy-checkpoints"
            )


def make_room(settings: RunSettings, fresh: bool) -> None:
    """Decide what becomes of what the output folder holds, and say so.

    A complete run is set aside, an unfinished one of the same settings goes on.

    Raises:
        ValueError: The folder is not of a demo, or holds an unfinished run of other settings.
    """
    output = Path(settings.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if not output.is_dir() or not any(output.iterdir()):
        return
    config = output / CONFIG_FILE
    if not config.is_file():
        raise ValueError(
            f"output must be a new folder or one of an earlier demo, got {output} without a "
            f"{CONFIG_FILE}; choose another --output"
        )
    if fresh or (output / SUMMARY).is_file():
        kept = set_aside(output)
        print(f"the earlier run is kept in {kept}; starting anew")
        return
    newest = latest_checkpoint(output / CHECKPOINTS)
    if newest is None:
        return
    changed = other_settings(config, settings)
    if changed is not None:
        name, before, now = changed
        raise ValueError(
            f"output must hold a run of the same settings, got an unfinished one in {output} with "
            f"{name}={before}, now {now}; ask for the same again to go on, or give --fresh to set "
            "it aside, or another --output"
        )
    print(f"going on with the unfinished run in {output} ({newest.name})")


def other_settings(config: Path, settings: RunSettings) -> tuple[str, Any, Any] | None:
    """The first setting that makes this another run than the saved one: name, before, now."""
    earlier = to_tree(build(OmegaConf.to_container(OmegaConf.load(config))))
    for path, before, now in differences(earlier, to_tree(settings)):
        if not any(path == free or path.startswith(f"{free}.") for free in MAY_CHANGE):
            return path, before, now
    return None


def where_it_stopped(options: argparse.Namespace) -> str:
    """What an interruption left."""
    newest = latest_checkpoint(Path(options.output) / CHECKPOINTS)
    if newest is None:
        return "stopped before the first update was done"
    return f"stopped; everything up to {newest} is saved"


def again(given: Sequence[str]) -> str:
    """The command that goes on: the same one without --fresh."""
    words = [word for word in given if word != "--fresh"]
    return " ".join([COMMAND, *words]) if words else f"make demo   (or: {COMMAND})"


def headline(summary: dict[str, Any]) -> str:
    """The result in one line."""
    reduction = summary["relative_reduction_oracle"]
    low, high = summary["relative_reduction_oracle_ci95"]
    if reduction is None or low is None or high is None:
        return "the base generator broke nothing; there was nothing to reduce"
    return (
        f"broken videos by the oracle: {reduction:.0%} fewer (95% interval {low:.0%} to {high:.0%})"
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End a terminated run as Ctrl-C would: saved."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
