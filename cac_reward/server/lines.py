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
    """Answer every message until the other side closes, which is how a child is told to end."""
    for line in sys.stdin:
        say(answers, answer(json.loads(line)))
