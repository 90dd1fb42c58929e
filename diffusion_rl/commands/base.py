"""What the commands share: statuses, the options of all, rewards named on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

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


def add_noise_level(command: argparse.ArgumentParser) -> None:
    """Let a command that draws videos draw them with noise."""
    command.add_argument(
        "--noise-level",
        type=float,
        default=0.0,
        metavar="LEVEL",
        help="draw with noise in every step but the last (coefficients-preserving steps); in "
        "[0, 1], 0 is the plain sampler",
    )


def with_local_path(settings: RunSettings, local_path: str | None) -> RunSettings:
    """Settings whose generator is read from a folder, if one is given."""
    if local_path is None:
        return settings
    generator = dataclasses.replace(settings.generator, local_path=local_path)
    return dataclasses.replace(settings, generator=generator)


def measures_named(texts: Sequence[str]) -> list[RewardSettings]:
    """Every --measure NAME=MODULE:CALLABLE, with options in braces where it takes any.

    Raises:
        ValueError: One has another form.
    """
    found = []
    for text in texts:
        name, equals, rest = text.partition("=")
        target, brace, options = rest.partition("{")
        try:
            given = OmegaConf.to_container(OmegaConf.create(brace + options)) if brace else {}
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(
                f"--measure must have options as YAML, got {text!r}: {error}"
            ) from error
        if not (name and equals and target):
            raise ValueError(
                "--measure must be NAME=MODULE:CALLABLE, or NAME=MODULE:CALLABLE{option: value}, "
                f"got {text!r}"
            )
        found.append(RewardSettings(name=name, target=target, options=cast(Any, given)))
    return found
