"""What can be known to be wrong with a run's stages before the first of them is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from cac_reward.data.storage import annotation_files
from cac_reward.judges.loading import LoadOptions
from cac_reward.training.curricula import JUDGE
from cac_reward.training.grpo import check_engine, count_questions
from cac_reward.training.measuring import check_choosing
from cac_reward.training.models import check_learnable
from cac_reward.training.processes import check_launcher
from cac_reward.training.rules import one_of
from cac_reward.training.settings import StageSettings
from cac_reward.training.stages import RESULT_FILE


def check_stages(stages: Sequence[StageSettings], processes: int) -> None:
    """Refuse what would end a later stage when those before it are trained.

    Finished stages are left alone, and so are judges that an earlier stage will make.

    Args:
        stages: of a curriculum, in their order.
        processes: that will train.

    Raises:
        FileNotFoundError, ImportError, ValueError: With the stage's number and the key.
    """
    made: set[Path] = set()
    for number, stage in enumerate(stages, 1):
        if not (Path(stage.output) / RESULT_FILE).is_file():
            try:
                _check(stage, processes, made)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"stage {number}: {error}") from error
            except ImportError as error:
                raise ImportError(f"stage {number}: {error}") from error
            except ValueError as error:
                raise ValueError(f"stage {number}: {error}") from error
        made.add(Path(stage.output) / JUDGE)


def _check(stage: StageSettings, processes: int, made: set[Path]) -> None:
    check_launcher(stage.optimizer.name)
    check_learnable(stage)
    check_choosing(stage.evaluation.best)
    _check_load(stage)
    _check_paths(stage, made)
    for name in stage.trackers:
        _check_tracker(name)
    if stage.optimizer.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ImportError(
            "optimizer.name 'adamw_8bit' needs bitsandbytes; install it with: pip install "
            "'cac-reward[quantization]', or set optimizer.name=adamw"
        )
    if stage.trainer == "grpo":
        check_engine(stage.rollout.vllm)
        count_questions(stage, processes)
    else:
        stage.batches(processes)


def _check_load(stage: StageSettings) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = stage.model
    try:
        LoadOptions(device=device, dtype=model.dtype, attention=model.attention)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _check_paths(stage: StageSettings, made: set[Path]) -> None:
    for key, files in (("train", stage.data.train), ("held_out", stage.data.held_out)):
        for file in files:
            try:
                annotation_files(Path(file))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"data.{key}: {error}") from error
            except ValueError as error:
                raise ValueError(f"data.{key}: {error}") from error
    if stage.data.videos is not None and not Path(stage.data.videos).is_dir():
        raise FileNotFoundError(
            f"data.videos must be an existing folder, got {stage.data.videos}; leave it out for "
            "videos beside their annotations"
        )
    for key, judge in _judges(stage):
        if Path(judge) not in made and not Path(judge).is_dir() and not _may_be_on_the_hub(judge):
            raise FileNotFoundError(
                f"model.{key} must be an existing folder or a hub id, got {judge}; 'previous' is "
                "the judge of the stage before"
            )


def _judges(stage: StageSettings) -> Iterator[tuple[str, str]]:
    yield "path", stage.model.path
    if stage.model.base is not None:
        yield "base", stage.model.base


def _may_be_on_the_hub(judge: str) -> bool:
    return judge.count("/") <= 1 and not judge.startswith(("/", ".", "~"))


def _check_tracker(name: str) -> None:
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    one_of("trackers", name, known)
    if name not in (*get_available_reporting_integrations(), "all", "none", "flyte"):
        raise ImportError(
            f"trackers must be installed, got {name!r}, which is not; install it with: "
            f"pip install {name}, or leave it out"
        )
