"""The command `cac-reward serve`: its arguments, and a server that finishes what it accepted."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cac_reward.judge_options import add_judge_arguments, given_judge_options, judge_options
from cac_reward.server.children import TOKEN_VARIABLE, ChildDiedError, ChildTimeoutError
from cac_reward.server.metrics import Metrics
from cac_reward.server.pipeline import Pipeline
from cac_reward.server.settings import ServerLimits, ServerSettings

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
_LIMIT_FLAGS = {one.name: "--" + one.name.replace("_", "-") for one in fields(ServerLimits)}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_server` takes."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--judge", metavar="FOLDER_OR_ID", help="folder or hub id")
    what.add_argument(
        "--scorer",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns a scorer or a reward, in place of a judge",
    )
    add_judge_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback needs a token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"whose one line a client must send; or set {TOKEN_VARIABLE}",
    )
    parser.add_argument(
        "--media-root", type=Path, metavar="FOLDER", help="whose files a request may name"
    )
    parser.add_argument(
        "--frames-fps", type=float, metavar="FPS", help="rate of clips that come without one"
    )
    limits = parser.add_argument_group("limits (bytes, seconds, numbers)")
    for one in fields(ServerLimits):
        kind = float if one.type == "float" else int
        flag = _LIMIT_FLAGS[one.name]
        limits.add_argument(flag, type=kind, default=one.default, metavar="N", help="%(default)s")


def run_server(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    What was accepted is answered before the server ends; a second SIGINT ends it at once.

    Args:
        options: what `add_serve_arguments` declares.

    Returns:
        0 after a clean end, 1 where a process could not be started.

    Raises:
        ValueError: A setting breaks its rule, or two do not go together.
        ImportError: fastapi or uvicorn is missing.
        OSError: The token file cannot be read, or the port is taken.
    """
    settings, scorer = settings_from(options, os.environ), scorer_from(options)
    try:
        import fastapi  # noqa: F401 - the error must come before a model is loaded.
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "cac-reward serve needs fastapi and uvicorn; install them with: "
            "pip install 'cac-reward[serve]'"
        ) from error
    return asyncio.run(_serve(settings, scorer))


def settings_from(options: argparse.Namespace, environment: Mapping[str, str]) -> ServerSettings:
    """Check the options and find the token.

    Raises:
        ValueError: A setting breaks its rule.
        OSError: The token file cannot be read.
    """
    token = environment.get(TOKEN_VARIABLE)
    if options.token_file is not None:
        token = options.token_file.read_text(encoding="utf-8").strip()
    return ServerSettings(
        host=options.host,
        port=options.port,
        token=token,
        media_root=options.media_root,
        frames_fps=options.frames_fps,
        limits=ServerLimits(**{name: getattr(options, name) for name in _LIMIT_FLAGS}),
    )


def scorer_from(options: argparse.Namespace) -> dict[str, object]:
    """What the model process loads, as JSON has it.

    Raises:
        ValueError: Options do not go together.
    """
    if options.scorer is None:
        return {"scorer": None, "judge": asdict(judge_options(options))}
    for name in given_judge_options(options):
        raise ValueError(
            f"{name} must be left out with scorer, got {getattr(options, name)!r}; the function "
            f"{options.scorer} decides it"
        )
    return {"scorer": options.scorer}


async def _serve(settings: ServerSettings, scorer: Mapping[str, object]) -> int:
    import socket

    import uvicorn

    from cac_reward.server.app import make_app

    metrics = Metrics()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.create_server((settings.host, settings.port), family=family)
    pipeline = Pipeline(settings, scorer, metrics)
    loop = asyncio.get_running_loop()
    try:
        starting = asyncio.create_task(pipeline.start())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, starting.cancel)
        try:
            await starting
        except (ChildDiedError, ChildTimeoutError) as error:
            logger.error("the server could not start: %s; its reason is above", error)
            return 1
        except asyncio.CancelledError:
            return 0
        server = _quiet_server(
            uvicorn.Config(
                make_app(settings, pipeline, metrics),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        watch = asyncio.create_task(_end_when_broken(pipeline, server))
        host, port = listening.getsockname()[:2]
        logger.warning("serving %s on http://%s:%d", pipeline.judge, host, port)
        await server.serve(sockets=[listening])
        watch.cancel()
        return 1 if pipeline.broken.is_set() else 0
    finally:
        await pipeline.stop()
        listening.close()


def _quiet_server(config: Any) -> Any:
    """A uvicorn server that leaves signals to us.

    uvicorn raises a caught signal again once it has ended, which would skip the cleaning up.
    """
    from contextlib import nullcontext

    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()

    return Server(config)


async def _end_when_broken(pipeline: Pipeline, server: Any) -> None:
    await pipeline.broken.wait()
    server.should_exit = True
