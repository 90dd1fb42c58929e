"""The scorer over HTTP, safe by default: bounded, confined, and with the model in its own process.

The server's own process reads no video and imports no torch: what a stranger sends is decoded in
one process, judged in another, and either may die without losing an accepted request.
"""

from cac_reward.server.command import add_serve_arguments, run_server

__all__ = ["add_serve_arguments", "run_server"]
