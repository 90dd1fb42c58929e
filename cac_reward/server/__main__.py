"""The server without the other commands: `python -m cac_reward.server --judge FOLDER_OR_ID`."""

from __future__ import annotations

import argparse
import logging
import sys

from cac_reward.server.command import add_serve_arguments, run_server


def main() -> int:
    """Serve until told to end; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cac_reward.server", description="Serve the reward.")
    add_serve_arguments(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run_server(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
