"""A run's folder: whether it may be used for a run, and by whom."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_rl.checkpoint import latest_checkpoint
from diffusion_rl.configuration import CONFIG_FILE, RunSettings, load_config, to_tree
from diffusion_rl.run_lock import release_lock, take_lock

logger = logging.getLogger(__name__)

CHECKPOINTS, PROMPTS_FILE = "checkpoints", "prompts.json"
# What may differ when a run goes on; the rest would make it another run.
MAY_CHANGE = (
    "output",  # It may have been moved.
    "updates",
    "save_every",
    "keep",
    "best_by",
    "trackers",
    "samples",
    "optimizer",
    "missing_limit",
    "evaluation",
    "hacking_alarm",
    *(f"rewards[].{name}" for name in ("retries", "retry_seconds", "on_error")),
    *(f"rewards[].{name}" for name in ("calls_at_once", "timeout_seconds")),
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


def claim(settings: RunSettings, *, restart: bool) -> None:
    """Make the output folder this run's alone, an earlier run's set aside if asked."""
    output = Path(settings.output)
    if restart and output.exists():
        take_lock(output)  # Not while it is being written to.
        release_lock(set_aside(output))
    take_lock(output)
    check_same_run(settings)


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
        ValueError: names every difference and the ways out.
    """
    output = Path(settings.output)
    if latest_checkpoint(output / CHECKPOINTS) is None:
        return
    if not (output / CONFIG_FILE).is_file():
        raise ValueError(
            f"output must hold a {CONFIG_FILE} beside its checkpoints, got none in {output}; put "
            "it back, or --restart to set the earlier run aside"
        )
    # Prompts may have moved, too, where what they say is known: it is compared when they are read.
    known = (output / PROMPTS_FILE).is_file()
    earlier = to_tree(read_earlier(output / CONFIG_FILE))
    found = [
        f"{path}={before}, now {now}"
        for path, before, now in differences(earlier, to_tree(settings))
        if not (may_change(path, before, now) or (known and path == "prompts"))
    ]
    if found:
        raise ValueError(
            f"output must be a new folder or hold a run of the same settings, got {output} made "
            f"with {'; '.join(found)}; choose another output, or --restart to set the earlier run "
            "aside"
        )


def read_earlier(path: Path) -> RunSettings:
    """The settings that a run was made with.

    Raises:
        ValueError: the file is damaged; names it and the ways out.
    """
    try:
        return load_config(path)
    except ValueError as error:
        raise ValueError(
            f"output must hold a whole {CONFIG_FILE} beside its checkpoints, got {path}, of which "
            f"{error}; put the one of a run of the same settings there, or --restart to set the "
            "earlier run aside"
        ) from error


def may_change(path: str, before: Any, now: Any) -> bool:
    """Whether a run may go on with this setting at another value."""
    place = re.sub(r"\[\d+\]", "[]", path)
    if place == "rewards[].target":  # A server that was started again may have another address.
        return all(str(target).startswith(("http://", "https://")) for target in (before, now))
    free = any(place == one or place.startswith(f"{one}.") for one in MAY_CHANGE)
    return free and path not in MUST_STAY


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
