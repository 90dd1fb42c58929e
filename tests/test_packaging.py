"""What a stranger types works: metadata, lock, Makefile, the installer, the README's commands."""

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
# The set that was installed and imported together; see the head of requirements.lock.
STACK = {
    "torch": "2.10.0",
    "torchvision": "0.25.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "diffusers": "0.42.1",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "einops": "0.8.2",
    "omegaconf": "2.4.0",
    "av": "18.1.0",
}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def setup_cfg() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read_string(read("setup.cfg"))
    return parser


def requirements(section: str, option: str) -> list[Requirement]:
    return [Requirement(line) for line in setup_cfg()[section][option].split("\n") if line]


def lock() -> dict[str, Requirement]:
    """Pins of requirements.lock by canonical name; a line that is no pin fails here."""
    lines = [line for line in read("requirements.lock").splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): pin for pin in pins}


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


def test_metadata() -> None:
    metadata = setup_cfg()["metadata"]
    version = metadata["version"]
    assert metadata["license"] == "Apache-2.0"
    assert "Apache License" in read("LICENSE")
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")
    assert f"\n## {version}" in read("CHANGELOG.md")
    for package in ("cac_reward", "diffusion_rl"):
        stated = re.findall(r'^__version__ = "(.*)"', read(f"{package}/__init__.py"), re.MULTILINE)
        assert set(stated) <= {version}


def test_python_versions_agree() -> None:
    assert setup_cfg()["options"]["python_requires"] == ">=3.11"
    assert 'target-version = "py311"' in read("pyproject.toml")
    assert installer().OLDEST_PYTHON == (3, 11)


def test_only_the_two_packages_are_installed() -> None:
    assert setup_cfg()["options.packages.find"]["include"].split() == [
        "cac_reward*",
        "diffusion_rl*",
    ]


def test_requirements_stay_open_and_cover_the_stack() -> None:
    wanted = requirements("options", "install_requires")
    assert set(STACK) <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert {specifier.operator for specifier in requirement.specifier} <= {">="}


def test_lock_pins_the_stack() -> None:
    pins = lock()
    assert {name: pinned_version(pins[name]) for name in STACK} == STACK


def test_lock_pins_satisfy_setup_cfg() -> None:
    pins = lock()
    extra = requirements("options.extras_require", "dev")
    for requirement in [*requirements("options", "install_requires"), *extra]:
        version = pinned_version(pins[canonicalize_name(requirement.name)])
        assert version in requirement.specifier


def test_lock_is_complete() -> None:
    pins = lock()
    missing = set()
    for name, pin in pins.items():
        if pin.marker and not pin.marker.evaluate():
            continue
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            wanted = not needed.marker or needed.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(needed.name) not in {*pins, "setuptools", "pip"}:
                missing.add(needed.name)
    assert missing == set()


def test_installed_packages_are_those_of_the_lock() -> None:
    for name, pin in lock().items():
        if not pin.marker or pin.marker.evaluate():
            assert importlib.metadata.version(name).split("+")[0] == pinned_version(pin)


def test_lock_names_no_host_and_no_path() -> None:
    assert not re.search(r"://|@|--|file:|\+", read("requirements.lock"))


def test_extras() -> None:
    extras = setup_cfg()["options.extras_require"]
    at_work = {"xformers", "quantization", "deepspeed", "serve", "synthesis", "notebooks"}
    assert set(extras) == at_work | {"dev", "all"}
    (everything,) = requirements("options.extras_require", "all")
    assert everything.extras == set(extras) - {"all"}
    assert everything.name == setup_cfg()["metadata"]["name"]


def test_console_entry_points_lead_to_a_main_function() -> None:
    lines = setup_cfg()["options.entry_points"]["console_scripts"].strip().split("\n")
    found = dict(re.fullmatch(r"([\w-]+) = ([\w.]+:\w+)", line).groups() for line in lines)
    assert found == {
        "cac-reward": "cac_reward.__main__:main",
        "diffusion-rl": "diffusion_rl.__main__:main",
    }
    for target in found.values():
        module, function = target.split(":")
        tree = ast.parse(read(module.replace(".", "/") + ".py"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_markers_are_declared_and_strict() -> None:
    section = setup_cfg()["tool:pytest"]
    assert "--strict-markers" in section["addopts"]
    declared = [line.split(":")[0] for line in section["markers"].strip().split("\n")]
    assert declared == ["gpu", "slow", "network"]


def makefile_targets() -> dict[str, str]:
    """Recipe of every target of the Makefile, prerequisites included."""
    found = re.findall(r"^([a-z-]+):(.*\n(?:\t.*\n)*)", read("Makefile"), re.MULTILINE)
    return dict(found)


def test_makefile_has_the_promised_targets() -> None:
    targets = makefile_targets()
    assert {"demo", "test", "lint", "toy-checkpoints", "clean"} <= set(targets)
    for name, recipe in targets.items():
        needs_python = "$(RUN)" in recipe
        assert needs_python == recipe.split("\n")[0].endswith(" environment"), name
    assert ".venv" not in re.sub(r"-path ./.venv -prune|@echo.*", "", targets["clean"])


def test_modules_that_the_makefile_and_the_readme_run_exist() -> None:
    named = re.findall(r"-m ([a-z_]+(?:\.\w+)*)", read("Makefile") + read("README.md"))
    assert "examples.toy_world.demo" in named
    for module in set(named):
        assert importlib.util.find_spec(module), f"python -m {module} leads nowhere"


def test_readme_commands_and_paths_exist() -> None:
    readme = read("README.md")
    commands = set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert commands >= {"demo", "test"}
    assert commands <= set(makefile_targets())
    paths = re.findall(r"`?((?:configs|examples|tests|diffusion_rl|cac_reward)/[\w./-]*)", readme)
    for path in set(paths):
        assert (REPOSITORY / path).exists(), f"README names {path}, which is not there"
    assert len(readme.splitlines()) <= 200


def test_ci_run_checks_style_and_tests_and_passes_failure_on(tmp_path: Path) -> None:
    calls, make = tmp_path / "calls", tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1" >> {calls}\n[ "$1" != "$FAILING" ]\n')
    make.chmod(0o755)
    for failing, expected in [
        ("", ["lint", "test"]),
        ("test", ["lint", "test"]),
        ("lint", ["lint"]),
    ]:
        calls.write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAILING": failing}
        code = subprocess.call([str(REPOSITORY / ".ci" / "run")], env=environment)
        assert calls.read_text().split() == expected
        assert (code == 0) == (failing == "")


def run_pytest(folder: Path, *sources: str) -> subprocess.CompletedProcess[str]:
    """Run our conftest.py over one test file for each source."""
    shutil.copy(REPOSITORY / "tests" / "conftest.py", folder)
    for index, source in enumerate(sources):
        (folder / f"test_{index}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--fail-on-skipped-file", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_run_passes_without_the_network(tmp_path: Path) -> None:
    network = "import pytest\n@pytest.mark.network\ndef test_a(): assert 0"
    run = run_pytest(tmp_path, "def test_a(): pass", network)
    assert run.returncode == pytest.ExitCode.OK
    assert "1 passed, 1 skipped" in run.stdout


def test_a_run_fails_when_a_test_fails_or_connects(tmp_path: Path) -> None:
    connects = "import socket\ndef test_a(): socket.create_connection(('192.0.2.1', 80))"
    run = run_pytest(tmp_path, "def test_a(): pass", "def test_a(): assert 0", connects)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "tests must not use the network, got a connection to ('192.0.2.1', 80)" in run.stdout
    assert "2 failed, 1 passed" in run.stdout


def test_a_run_fails_when_no_test_ran(tmp_path: Path) -> None:
    assert run_pytest(tmp_path, "x = 1").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_one_wholly_skipped_file_fails_a_run_of_two(tmp_path: Path) -> None:
    skipped = "import pytest\npytest.importorskip('no_such')"
    run = run_pytest(tmp_path, "def test_a(): pass", skipped)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "every test was skipped in: test_1.py" in run.stdout


def installer() -> ModuleType:
    """The module .ci/install.py, which is a script outside the packages."""
    spec = importlib.util.spec_from_file_location("install", REPOSITORY / ".ci" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that decide what is installed, as the current directory."""
    for name in installer().DEFINING_FILES:
        shutil.copy(REPOSITORY / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake_environment(clone: Path, pip: str) -> None:
    """A .venv whose python answers every call with the shell commands `pip`."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{pip}\n')
    python.chmod(0o755)


@pytest.mark.parametrize("version", [(3, 10, 9), (2, 7, 18)])
def test_an_old_python_is_refused(version: tuple[int, ...]) -> None:
    complaint = installer().python_complaint(version)
    assert re.match(rf"Python must be 3.11 or newer, got {version[0]}.{version[1]} ", complaint)
    assert "make PYTHON=" in complaint


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (4, 0, 0)])
def test_a_new_python_is_accepted(version: tuple[int, ...]) -> None:
    assert installer().python_complaint(version) == ""


def test_the_installer_parses_on_an_old_python() -> None:
    ast.parse(read(".ci/install.py"), feature_version=(3, 4))


def test_a_python_that_is_not_there_is_told_so() -> None:
    command = ["make", "environment", "PYTHON=no_such_python"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "no_such_python was not found; name a Python with: make PYTHON=" in run.stdout


def test_a_second_call_does_nothing_until_a_file_changes(
    clone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_environment(clone, 'echo "$@" >> pip_calls')
    calls = clone / "pip_calls"
    install = installer()
    install.main()
    assert calls.read_text() == (
        "-m pip install -r requirements.lock\n-m pip install --no-deps -e .\n"
    )
    assert "Environment ready" in capfd.readouterr().out
    calls.unlink()
    install.main()
    assert not calls.exists()
    assert capfd.readouterr().out == ""
    for name in install.DEFINING_FILES:
        (clone / name).write_text(read(name) + "# changed\n")
        install.main()
        assert calls.exists(), name
        calls.unlink()


def test_a_failing_install_names_package_and_reason_and_is_tried_again(clone: Path) -> None:
    fake_environment(
        clone,
        "echo 'Collecting einops==0.8.2'\necho 'Collecting av==18.1.0'\n"
        "echo 'ERROR: No matching distribution found for av==18.1.0' >&2\nexit 1",
    )
    install = installer()
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"package: av==18.1.0\nreason:  ERROR: No matching"):
            install.main()
    assert not (clone / install.STAMP).exists()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["Collecting a==1", "ERROR: No matching distribution found for b==2"],
            "package: b==2\nreason:  ERROR: No matching distribution found for b==2",
        ),
        (
            ["Collecting a==1", "  Downloading a-1.whl", "ERROR: Could not install: No space left"],
            "package: a-1.whl\nreason:  ERROR: Could not install: No space left",
        ),
        (
            ["Collecting b", "error: gcc failed", "  ERROR: Failed building wheel for c"],
            "package: c\nreason:  error: gcc failed\n  ERROR: Failed building wheel for c",
        ),
        (
            ["ERROR: Cannot install a==1, b==2 and c==3 because these conflict."],
            "package: a==1, b==2 and c==3\nreason:  ERROR: Cannot install a==1, b==2 and c==3 "
            "because these conflict.",
        ),
        (
            ["Collecting a==1", "Killed"],
            "package: a==1\nreason:  pip gave none; its last line was: Killed",
        ),
        ([], "package: unknown (pip named none)\nreason:  pip gave none; its last line was: none"),
    ],
)
def test_what_is_said_of_a_failed_install(lines: list[str], expected: str) -> None:
    assert installer().diagnosis(lines) == expected


def test_a_half_made_environment_is_made_anew(clone: Path) -> None:
    install = installer()
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nonexistent/python")
    (clone / ".venv" / "left_over").write_text("")
    install.make_environment()
    command = [install.PYTHON, "-m", "pip", "--version"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.startswith(b"pip ")
    assert not (clone / ".venv" / "left_over").exists()


def test_a_python_without_venv_is_told_so(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="/bin/false could not make .venv; its venv module"):
        installer().make_environment()


def test_a_working_environment_is_kept(clone: Path) -> None:
    fake_environment(clone, "exit 1")
    (clone / ".venv" / "kept").write_text("")
    installer().make_environment()
    assert (clone / ".venv" / "kept").exists()
