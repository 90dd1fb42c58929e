"""What the commands share: statuses, the options of all, rewards named on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusion_rl.configuration import RunSettings
from diffusion_rl.rewards import RewardSettings

INTERRUPTED = 130
USER_ERRORS = (ValueError, RuntimeError, OSError, ImportError)

Subparsers = Any
"""What argparse's `add_subparsers` gives; its class is private."""


def shared_options() -> argparse.ArgumentParser:
    """A parent parser with the options that every command takes."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--local-path", help="generator folder to read instead of the hub")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")
    return shared


def with_local_path(settings: RunSettings, local_path: str | None) -> RunSettings:
    """Settings whose generator is read from a folder, if one is given."""
    if local_path is None:
        return settings
    generator = dataclasses.replace(settings.generator, local_path=local_path)
    return dataclasses.replace(settings, generator=generator)


def measures_named(texts: Sequence[str]) -> list[RewardSettings]:
    """Every --measure NAME=MODULE:CALLABLE.

    Raises:
        ValueError: One has another form.
    """
    found = []
    for text in texts:
        name, equals, target = text.partition("=")
        if not (name and equals and target):
            raise ValueError(f"--measure must be NAME=MODULE:CALLABLE, got {text!r}")
        found.append(RewardSettings(name=name, target=target))
    return found
