"""The child's side of a conversation in lines of JSON over standard input and output.

Nothing but JSON crosses: pixels go through files of the spool, and no object is ever pickled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

Message = dict[str, Any]
SPENT = "spent"
"""Key of an answer after which the process must be replaced, such as when its memory was full."""


def claim_stdout() -> IO[str]:
    """Take standard output for the answers; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def say(answers: IO[str], message: Message) -> None:
    """Write one message and send it off."""
    answers.write(json.dumps(message, allow_nan=False) + "\n")
    answers.flush()


def answer_lines(answers: IO[str], answer: Callable[[Message], Message]) -> None:
    """Answer messages until the other side closes or the process is spent."""
    for line in sys.stdin:
        reply = answer(json.loads(line))
        say(answers, reply)
        if reply.get(SPENT):
            return
