"""The command `cac-reward train`."""

from __future__ import annotations

import argparse
import logging
import sys

from cac_reward.training.beforehand import check_stages
from cac_reward.training.curricula import load_curriculum
from cac_reward.training.learning import TrainingError
from cac_reward.training.processes import processes
from cac_reward.training.stages import StageResult, run_stage

STOPPED = 130
"""Exit status after Ctrl-C."""
FAILED = 2
"""Exit status for what the user can mend."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Train a judge by one stage's YAML, or by a curriculum of stages. The same command goes on "
        "where it stopped. For several processes: accelerate launch -m cac_reward train CONFIG"
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="of a stage, or of a curriculum")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="of every stage, as updates=100; of the second, as 2.updates=100",
    )
    parser.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> int:
    """Run every stage that is not finished; says what each came to."""
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    stages = load_curriculum(options.config, options.overrides)
    check_stages(stages, processes().num_processes)
    speaks = processes().is_main_process
    for number, stage in enumerate(stages, 1):
        if speaks:
            print(f"stage {number} of {len(stages)}: {stage.trainer} on {stage.model.path}")
        try:
            result = run_stage(stage)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on from {stage.output}", file=sys.stderr)
            return STOPPED
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        if speaks:
            _report(result)
    return 0


def _report(result: StageResult) -> None:
    for name, value in result.measured.items():
        print(f"  {name:28} {value:.4f}")
    print(f"  {result.updates} updates in {result.seconds:.0f} s; judge: {result.judge}")
    if result.skipped is not None:
        print(result.skipped, file=sys.stderr)
