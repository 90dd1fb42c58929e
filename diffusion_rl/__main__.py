"""The command line: python -m diffusion_rl train | sample | best-of-n | evaluate | export."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from diffusion_rl.commands import best_of_n, evaluate, export, sample, train
from diffusion_rl.commands.base import INTERRUPTED, USER_ERRORS, shared_options

COMMANDS = (train, sample, best_of_n, evaluate, export)
"""A command is a file of `commands/` with an `add_parser`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes a list only where it stands in one piece; overrides may also follow options.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*options.overrides, *rest]
    # Of several processes the first speaks; what only another one knows is a warning.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # Loading one file in a cache makes as much noise as an update; warnings stay.
    for name in ("httpx", "httpcore", "huggingface_hub", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # As in a script's background.
        signal.signal(signal.SIGINT, _interrupt)
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
    shared = shared_options()
    for command in COMMANDS:
        command.add_parser(commands, shared)
    return parser


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End a terminated run as Ctrl-C does: saved."""
    # A launcher that is interrupted terminates its processes too, which are saving by then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
