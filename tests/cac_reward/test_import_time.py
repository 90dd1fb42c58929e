"""`import cac_reward` stays under a second: nothing heavy is loaded before it is needed."""

import re
import subprocess
import sys

MAX_SECONDS = 1.0
TRIES = 3


def import_seconds(statement: str, package: str) -> float:
    """Seconds that a package took to import, with all that it imports, in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(rf"\|\s+(\d+) \|\s+{re.escape(package)}$", run.stderr, re.MULTILINE)
    return int(found[-1]) / 1e6


def test_the_package_imports_in_under_a_second() -> None:
    # The machine may be busy with something else; the fastest try is the package's own time.
    assert (
        min(import_seconds("import cac_reward", "cac_reward") for _ in range(TRIES)) < MAX_SECONDS
    )


def test_a_slow_import_would_be_seen() -> None:
    assert import_seconds("import cac_reward.scorer", "torch") > 10 * import_seconds(
        "import cac_reward", "cac_reward"
    )
