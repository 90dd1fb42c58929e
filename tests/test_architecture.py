"""The rules of the house that a machine can check: layers, light imports, sizes, tolerances."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# A file imports only from files above it. "judges/" stands for every file of that folder that has
# no row of its own; such files do not import one another.
LAYERS = {
    "cac_reward": [
        *("plain", "whole_files", "display", "pixels"),
        *("report", "taxonomy", "overlap", "video", "records", "frames", "questions", "answers"),
        *("cache", "calibration"),
        *(
            *("judges/families", "judges/votes", "judges/tokens", "judges/base"),
            "judges/chat_messages",
            *("judges/attention", "judges/loading"),
            *("judges/rendering", "judges/reading"),
            "judges/",
            "inputs",
            "cases",
            "scorer",
            "alignment",
        ),
        "judge_options",
        *("client", "adapters/base", "adapters/settings", "adapters/texts", "adapters/"),
        *("server/settings", "server/lines", "server/children", "server/metrics"),
        *("server/wire", "server/decoding", "server/judging", "server/pipeline", "server/app"),
        *("server/command", "server/"),
        *("drawing", "tables", "page_assets", "page", "exports/base", "exports/", "exporting"),
        *("batch", "score_command"),
        *("data/annotations", "data/lines", "data/parquet", "data/shards", "data/storage"),
        "data/videos",
        *("data/checking", "data/importers/base", "data/importers/", "data/importing"),
        *("data/synthesis/motion", "data/synthesis/targets", "data/synthesis/blending"),
        *("data/synthesis/places", "data/synthesis/surfaces", "data/synthesis/moments"),
        *("data/synthesis/lettering", "data/synthesis/harmless", "data/synthesis/faults"),
        *("data/synthesis/planting", "data/synthesis/making", "data/synthesis/running"),
        *("data/synthesis/sheet", "data/synthesis/"),
        *("data/teaching/settings", "data/teaching/stretches", "data/teaching/verifying"),
        *("data/teaching/wording", "data/teaching/lessons", "data/teaching/vanguard"),
        *("data/teaching/srvau", "data/teaching/recipes", "data/teaching/asking"),
        *("data/teaching/running", "data/teaching/"),
        "data/",
        *("evaluation/classification", "evaluation/intervals", "evaluation/grounding"),
        *("evaluation/predictions", "evaluation/answered", "evaluation/published"),
        "evaluation/pairing",
        *("evaluation/protocols", "evaluation/sums", "evaluation/tasks"),
        *("evaluation/measuring", "evaluation/writing", "evaluation/vau_eval", "evaluation/"),
        *("training/task_answers", "training/tasks", "training/rollouts"),
        *("training/stage_rewards", "training/group_rewards"),
        *(
            "training/rules",
            "training/lessons",
            "training/lesson_kinds",
            "training/grpo_settings",
            "training/settings",
            "training/curricula",
            "training/encoding",
            "training/clips",
        ),
        *("training/source", "training/pictures", "training/optimizers", "training/heads"),
        *("training/processes", "training/models", "training/classifier", "training/asking"),
        *("training/measuring", "training/cards"),
        *("training/checkpoints", "training/stopping", "training/learning"),
        *("training/sft", "training/answering", "training/grpo", "training/stages"),
        *("training/beforehand", "training/"),
        "__main__",
    ],
    "diffusion_rl": [
        *("shapes", "whole_files", "processes", "sharding", "shares", "packing", "run_lock"),
        *("gaussian_steps", "transitions"),
        *("advantages", "blame", "credit", "divergences", "losses", "surrogates"),
        "group_losses",
        *("algorithms", "row_kinds", "row_settings", "guards", "trends", "prompts"),
        *("loading", "prompt_sampling"),
        *("memory_errors", "reward_contract", "reward_worker", "remote_rewards"),
        *("rewards", "generators/base", "generators/families"),
        *("generators/settings", "generators/execution", "generators/prompt_cache"),
        "generators/weight_savings",
        "generators/pipeline",
        *("generators/wan", "generators/", "lora", "full_policies", "sharded_policies", "policies"),
        *(
            "lora_files",
            "weight_files",
            "out_of_memory",
            "recording",
            "rollout",
            "sampling",
            "memory",
        ),
        *("outcomes", "noising", "optimizers", "zero", "step_losses", "updates"),
        *(
            "self_check",
            "progress",
            "update_memory",
            "collect",
            "drawing",
            "held_out",
            "finetune",
            "checkpoint",
            "faults",
            "tracking",
            "comparison",
            "charts",
            "style",
        ),
        *("clips", "samples", "page", "evaluation", "vbench", "evaluation_parts"),
        *(
            "before_after",
            "best_of_n",
            "configuration",
            "run_folder",
            "card",
            "preflight",
            "launch",
        ),
        *("exports/parts", "exports/comfyui", "exports/peft_layout", "exports/merged"),
        *("exports/formats", "exports/"),
        *("commands/base", "commands/", "__main__"),
    ],
}
# The only files that may import HEAVY packages, the (!) of the design.
HEAVY = {"diffusers", "transformers", "trl", "peft", "fastapi", "uvicorn", "openai", "vllm"}
HEAVY_FILES = {
    "cac_reward/judges/attention.py",
    "cac_reward/judges/loading.py",
    "cac_reward/judges/local.py",
    "cac_reward/judges/endpoint.py",
    "cac_reward/data/teaching/asking.py",
    "cac_reward/evaluation/vau_eval.py",
    "cac_reward/server/app.py",
    "cac_reward/server/command.py",
    "cac_reward/training/",
    "diffusion_rl/generators/",
    "diffusion_rl/lora.py",
    "diffusion_rl/exports/merged.py",
    "diffusion_rl/exports/peft_layout.py",
}
ALWAYS_LIGHT = {
    "diffusion_rl/generators/base.py",
    "diffusion_rl/generators/families.py",
    "diffusion_rl/generators/settings.py",
}
LIGHT = "torch, einops, omegaconf"

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
MAX_TOLERANCE = 1e-2
MAX_RECIPE_LINES = 60
RECIPE_HEAD = ["Purpose", "Source", "Launch", "Memory and hardware", "Override"]
# Where a rule makes a file worse it is broken here, with the reason.
TOO_MANY_ARGUMENTS_BECAUSE = {
    "cac_reward.adapters.verl_omni.compute_score": "verl-omni fills arguments in by their names",
    "cac_reward.scorer.CaCScorer.from_pretrained": "the one call that names every setting",
    "diffusion_rl.losses.awm_surrogate": "the formula has these symbols",
    "diffusion_rl.losses.nft_loss": "the formula has these symbols",
    "diffusion_rl.rollout.rollout": "what is drawn, how, and which part of it here",
    "diffusion_rl.transitions.cps": "every transition has this one signature",
    "diffusion_rl.transitions.dance_sde": "every transition has this one signature",
    "diffusion_rl.transitions.ddim": "every transition has this one signature",
    "diffusion_rl.transitions.flow_sde": "every transition has this one signature",
    "diffusion_rl.transitions.flow_sde_cut": "every transition has this one signature",
    "diffusion_rl.transitions.flow_sde_wan": "every transition has this one signature",
    "diffusion_rl.transitions.ode": "every transition has this one signature",
    "diffusion_rl.transitions.TransitionFunction.__call__": "every transition has this signature",
}


def sources(*folders: str) -> list[str]:
    """Paths of the Python files of the checkout below these folders, relative to its root."""
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    return sorted(str(path.relative_to(REPOSITORY)) for path in found)


def parse(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=path)


PACKAGE_FILES = sources(*LAYERS)
ALL_FILES = sources(*LAYERS, "examples", "tests", "benchmarks", ".ci")
TEST_FILES = sources("tests")


def imported_modules(tree: ast.AST, path: str) -> Iterator[str]:
    """Full names that a file imports anywhere, relative and from-imports resolved."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def row_of(module: str, package: str) -> int | None:
    """Row of a module in its package's table; None for the package itself."""
    names = module.split(".")[1:]
    paths = ["/".join(names[:count]) for count in range(len(names), 0, -1)]
    for candidate in [*paths, *(f"{path}/" for path in paths)]:
        if candidate in LAYERS[package]:
            return LAYERS[package].index(candidate)
    return None


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def layer_faults(tree: ast.AST, path: str) -> list[str]:
    """Imports of a package's file that do not point at a file above it."""
    package = path.split("/")[0]
    module = module_of(path)
    own = row_of(module, package)
    faults = []
    for name in imported_modules(tree, path):
        row = row_of(name, package) if name.split(".")[0] == package else None
        if row is None or own is None or row < own:
            continue
        if path.endswith("__init__.py") and name.startswith(module.removesuffix("__init__")):
            continue
        faults.append(f"{path} must import only from files above it, got {name}")
    return faults


@pytest.mark.parametrize("path", PACKAGE_FILES)
def test_a_file_imports_only_from_files_above_it(path: str) -> None:
    package = path.split("/")[0]
    known = row_of(module_of(path), package) is not None or path == f"{package}/__init__.py"
    assert known, f"give {path} a row in LAYERS, in the order of the design"
    assert layer_faults(parse(path), path) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cac_reward/report.py", "from cac_reward.scorer import CaCScorer"),
        ("cac_reward/report.py", "from . import scorer"),
        ("cac_reward/judges/base.py", "from cac_reward.judges.local import LocalJudge"),
        ("cac_reward/judges/local.py", "from cac_reward.judges import endpoint"),
        ("diffusion_rl/losses.py", "def f():\n    import diffusion_rl.finetune"),
        ("diffusion_rl/rollout.py", "from .evaluation import compare"),
        ("diffusion_rl/generators/base.py", "from .wan import WanGenerator"),
        ("diffusion_rl/generators/__init__.py", "from diffusion_rl.lora import attach_lora"),
    ],
)
def test_the_layer_check_can_fail(path: str, line: str) -> None:
    assert len(layer_faults(ast.parse(line), path)) == 1
    assert layer_faults(ast.parse("import math"), path) == []


@pytest.mark.parametrize("path", PACKAGE_FILES)
def test_the_two_packages_do_not_know_each_other(path: str) -> None:
    own = path.split("/")[0]
    strangers = {*LAYERS, "examples", "tests", "benchmarks"} - {own}
    roots = {name.split(".")[0] for name in imported_modules(parse(path), path)}
    assert not roots & strangers


def may_be_heavy(path: str) -> bool:
    allowed = any(path == file or path.startswith(file) for file in HEAVY_FILES if file != path)
    return (allowed or path in HEAVY_FILES) and path not in ALWAYS_LIGHT


@pytest.mark.parametrize("path", [path for path in PACKAGE_FILES if not may_be_heavy(path)])
def test_only_marked_files_import_heavy_packages(path: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(parse(path), path)}
    assert not roots & HEAVY


def newly_loaded(statement: str) -> set[str]:
    """Third-party packages that a statement loads in a fresh interpreter, beyond the light ones."""
    program = (
        f"import sys, {LIGHT}\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(' '.join(new - set(sys.stdlib_module_names)))\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("package", LAYERS)
def test_importing_a_package_loads_only_light_packages(package: str) -> None:
    assert newly_loaded(f"import {package}") == {package}


@pytest.mark.parametrize("heavy", ["diffusers", "torchvision"])
def test_the_light_import_check_can_fail(heavy: str) -> None:
    assert heavy in newly_loaded(f"import diffusion_rl, {heavy}")


@pytest.mark.parametrize("package", LAYERS)
def test_files_above_the_first_heavy_one_load_no_heavy_package(package: str) -> None:
    rows = {path: row_of(module_of(path), package) for path in sources(package)}
    heavy = [row for path, row in rows.items() if row is not None and may_be_heavy(path)]
    above = [path for path, row in rows.items() if row is not None and row < min(heavy)]
    assert len(above) > 5
    loaded = newly_loaded("import " + ", ".join(module_of(path) for path in above))
    assert package in loaded
    assert not loaded & HEAVY


def test_every_heavy_file_that_exists_is_in_the_design() -> None:
    heavy = {
        path
        for path in PACKAGE_FILES
        if HEAVY & {name.split(".")[0] for name in imported_modules(parse(path), path)}
    }
    assert all(may_be_heavy(path) for path in heavy)


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function and method with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{node.name}" if hasattr(node, "name") and node.name else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions(node, name)


def count_arguments(function: ast.FunctionDef) -> int:
    """Arguments a caller can give, without self or cls."""
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def count_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring: explaining more is never a fault."""
    first = function.body[0]
    is_docstring = ast.get_docstring(function) is not None
    documented = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - documented


def size_faults(tree: ast.AST, path: str) -> list[str]:
    """Functions that are longer or take more than the house allows."""
    faults = []
    for name, function in functions(tree, module_of(path)):
        lines = count_lines(function)
        if lines > MAX_FUNCTION_LINES:
            faults.append(f"{name} must have at most {MAX_FUNCTION_LINES} lines, got {lines}")
        count = count_arguments(function)
        is_test = path.startswith("tests/")  # Builders of test models and fixtures.
        if count > MAX_ARGUMENTS and not is_test and name not in TOO_MANY_ARGUMENTS_BECAUSE:
            faults.append(f"{name} must take at most {MAX_ARGUMENTS} arguments, got {count}")
    return faults


@pytest.mark.parametrize("path", ALL_FILES)
def test_sizes(path: str) -> None:
    lines = len((REPOSITORY / path).read_text(encoding="utf-8").splitlines())
    is_test = path.startswith("tests/")  # One file for each module, however much there is to test.
    assert is_test or lines <= MAX_MODULE_LINES, f"{path} has {lines} lines; split it by idea"
    assert size_faults(parse(path), path) == []


def test_the_size_check_can_fail() -> None:
    long = "class A:\n    def f(self):\n" + "        pass\n" * MAX_FUNCTION_LINES
    wide = "def g(a, b, c, d, *, e, f, h, i): pass"
    documented = long.replace("self):\n", 'self):\n        """Two\n        lines."""\n')
    for source in (long, documented):
        fault = size_faults(ast.parse(source), "a.py")[0]
        assert "a.A.f must have at most 60 lines, got 61" in fault
    assert "a.g must take at most 7 arguments, got 8" in size_faults(ast.parse(wide), "a.py")[0]


def test_every_exemption_is_still_needed() -> None:
    counts = {
        name: count_arguments(function)
        for path in ALL_FILES
        for name, function in functions(parse(path), module_of(path))
    }
    for name in TOO_MANY_ARGUMENTS_BECAUSE:
        assert counts.get(name, 0) > MAX_ARGUMENTS, f"{name} needs no exemption any more"


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of handlers that swallow any error; raising it again, or with more words, is fine."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(kind) if kind else "everything" for kind in caught}
        last = node.body[-1]
        reraises = isinstance(last, ast.Raise) and (last.exc is None or last.cause is not None)
        if names & {"everything", "Exception", "BaseException"} and not reraises:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", ALL_FILES)
def test_no_broad_except(path: str) -> None:
    assert broad_handlers(parse(path)) == []


@pytest.mark.parametrize("caught", ["", " Exception", " BaseException", " (OSError, Exception)"])
def test_the_broad_except_check_can_fail(caught: str) -> None:
    swallow = f"try:\n    f()\nexcept{caught}:\n    pass"
    assert broad_handlers(ast.parse(swallow)) == [3]
    assert broad_handlers(ast.parse(swallow.replace("pass", "raise ValueError()"))) == [3]
    for way_out in ("raise", "raise ValueError() from error"):
        assert broad_handlers(ast.parse(swallow.replace("pass", way_out))) == []


def wide_tolerances(tree: ast.AST) -> list[str]:
    """Tolerances above the limit, and those that this check cannot read."""
    wide = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.keyword) or node.arg not in {"rtol", "atol", "rel", "abs"}:
            continue
        try:
            value = float(eval(ast.unparse(node.value), {"__builtins__": {}}))
        except NameError:
            wide.append(f"{node.arg}={ast.unparse(node.value)} is not a number written out")
            continue
        if value > MAX_TOLERANCE:
            wide.append(f"{node.arg}={value}")
    return wide


@pytest.mark.parametrize("path", TEST_FILES)
def test_no_wide_tolerances(path: str) -> None:
    assert wide_tolerances(parse(path)) == []


@pytest.mark.parametrize("argument", ["rtol=0.02", "atol=1", "rel=1e-1", "abs=loose", "abs=1 / 10"])
def test_the_tolerance_check_can_fail(argument: str) -> None:
    assert len(wide_tolerances(ast.parse(f"check(a, b, {argument})"))) == 1
    assert wide_tolerances(ast.parse("check(a, b, rtol=1e-5, atol=0.01)")) == []


@pytest.mark.parametrize("path", ALL_FILES)
def test_sources_are_ascii(path: str) -> None:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if not line.isascii()] == []


RECIPES = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_is_short_and_says_what_it_is(path: str) -> None:
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_RECIPE_LINES
    heads = [re.match(r"# ([A-Z][a-z ]+): \S", line) for line in lines[:5]]
    assert [head and head.group(1) for head in heads] == RECIPE_HEAD
    assert path in lines[2]
    assert path in lines[4]
