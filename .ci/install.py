"""Make .venv and install requirements.lock and this package when either is missing or changed.

Called by the Makefile before every target that runs Python. A stamp inside .venv holds a hash of
what was installed, so that a call with nothing to do takes a fraction of a second. The syntax stays
old on purpose: a Python that is too old must get as far as saying so.
"""

from __future__ import print_function

import hashlib
import os
import re
import subprocess
import sys
import time

OLDEST_PYTHON = (3, 11)
DEFINING_FILES = ("requirements.lock", "setup.cfg", "pyproject.toml")
ENVIRONMENT = ".venv"
STAMP = os.path.join(ENVIRONMENT, "installed.sha256")
PYTHON = os.path.join(ENVIRONMENT, "bin", "python")


def python_complaint(version):
    """What to tell somebody whose Python is too old, or an empty string."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return ""
    return (
        "Python must be 3.11 or newer, got {}.{} ({}); name a newer one with: "
        "make PYTHON=/path/to/python3.11 ...".format(version[0], version[1], sys.executable)
    )


def fingerprint():
    """Hash of everything that decides what .venv should hold."""
    digest = hashlib.sha256()
    for name in DEFINING_FILES:
        with open(name, "rb") as file:
            digest.update(name.encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def is_current():
    """Whether .venv was completely installed from the files as they are now."""
    if not (os.path.exists(PYTHON) and os.path.exists(STAMP)):
        return False
    with open(STAMP) as file:
        return file.read().strip() == fingerprint()


def diagnosis(lines):
    """Name the package a failed pip stopped at, and its reason, from pip's output lines."""
    reasons = [line.strip() for line in lines if re.match(r"\s*(ERROR|error|OSError)\b", line)]
    started = r"^\s*(?:Collecting|Downloading|Processing|Obtaining) (\S+)"
    named = r"(?:distribution found for|building wheel for|Cannot install) (.+?)(?: because|$)"
    package = "unknown (pip named none)"
    for pattern, candidates in ((started, lines), (named, reasons)):
        found = [match.group(1) for match in (re.search(pattern, c) for c in candidates) if match]
        package = found[-1] if found else package
    if not reasons:
        last = lines[-1].strip() if lines else "none"
        reasons = ["pip gave none; its last line was: " + last]
    return "package: {}\nreason:  {}".format(package, "\n  ".join(reasons[-3:]))


def run_pip(arguments):
    """Run pip with its output shown as it comes; stop with a diagnosis when it fails."""
    command = [PYTHON, "-m", "pip"] + arguments
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    ) as child:
        for line in child.stdout:
            lines.append(line.rstrip())
            if not line.startswith("Requirement already satisfied"):
                print("  " + lines[-1], flush=True)
    if child.returncode != 0:
        sys.exit(
            "\nInstallation failed: {}\n{}\n"
            "What was installed so far is kept; solve this and type the same command again.".format(
                " ".join(command), diagnosis(lines)
            )
        )


def make_environment():
    """Create .venv where there is none, and create it anew where it has no working pip."""
    works = os.path.exists(PYTHON) and (
        subprocess.call(
            [PYTHON, "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"],
            stderr=subprocess.DEVNULL,
        )
        == 0
    )
    if works:
        return
    print("Making {} with {}".format(ENVIRONMENT, sys.executable), flush=True)
    if subprocess.call([sys.executable, "-m", "venv", "--clear", ENVIRONMENT]) != 0:
        sys.exit(
            "{} could not make {}; its venv module may be a package of its own "
            "(Debian, Ubuntu: apt install python3-venv)".format(sys.executable, ENVIRONMENT)
        )


def main():
    """Bring .venv up to date, or do nothing when it is."""
    complaint = python_complaint(sys.version_info)
    if complaint:
        sys.exit(complaint)
    if is_current():
        return
    started = time.time()
    make_environment()
    print("Installing requirements.lock (8 GB on disk; minutes the first time)", flush=True)
    run_pip(["install", "-r", "requirements.lock"])
    run_pip(["install", "--no-deps", "-e", "."])
    partial = STAMP + ".partial"
    with open(partial, "w") as file:
        file.write(fingerprint() + "\n")
    os.replace(partial, STAMP)
    print("Environment ready after {:.0f} s".format(time.time() - started), flush=True)


if __name__ == "__main__":
    main()
