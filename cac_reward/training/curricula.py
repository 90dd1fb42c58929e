"""A curriculum: the stages of one YAML, each beginning with the judge of the one before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cac_reward.training.rules import near_name
from cac_reward.training.settings import StageSettings, build_stage, read_yaml

JUDGE = "judge"
"""Folder of the finished judge, in a stage's output."""
PREVIOUS = "previous"
"""As `model.path` in a curriculum: the judge of the stage before."""
KEYS = ("stages", "all", "output")
_NUMBERED = re.compile(r"(\d+)\.(.+)", re.DOTALL)


def load_curriculum(path: str | Path, overrides: Sequence[str] = ()) -> list[StageSettings]:
    """The stages of a YAML: one, or those below `stages`, each a file or settings in place.

    A curriculum has `stages`, a list whose entries are `{config: FILE}` with settings of their own
    beside it, or whole settings, and a `name` if they like; and `all`, settings that hold for every
    stage. `model.path: previous` takes the judge of the stage before. `output` of a stage is by
    default the curriculum's with the stage's number and name behind it.

    Args:
        path: of the YAML; files that it names are looked for beside it.
        overrides: `key.path=value` for every stage, but for `output`, which is the curriculum's,
            and `model.path`, which stages that begin with the judge before them do not take;
            `2.key.path=value` for the second stage alone.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If something does not fit, with its key.
    """
    path = Path(path)
    tree = read_yaml(path)
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: config must have keys, got a list")
    if "stages" not in tree:
        return [build_stage(tree, str(path), overrides)]
    _check_keys(path, tree)
    output, rest = tree.get("output"), []
    for override in overrides:
        numbered = _NUMBERED.fullmatch(override)
        if numbered and not 1 <= int(numbered[1]) <= len(tree.stages):
            raise ValueError(
                f"overrides must be of stages 1 to {len(tree.stages)}, got {override!r}"
            )
        if override.startswith("output=") and len(override) > len("output="):
            output = override.removeprefix("output=")
        else:
            rest.append(override)
    stages: list[StageSettings] = []
    for number in range(1, len(tree.stages) + 1):
        name, merged = _merge(path, tree, number, output)
        of_all = [one for one in rest if not _NUMBERED.fullmatch(one)]
        if OmegaConf.select(merged, "model.path") == PREVIOUS:
            if not stages:
                raise ValueError(f"{name}: model.path must be a judge for the first stage")
            merged.model.path = f"{stages[-1].output}/{JUDGE}"
            of_all = [one for one in of_all if not one.startswith("model.path=")]
        of_one = [one.partition(".")[2] for one in rest if one.startswith(f"{number}.")]
        stages.append(build_stage(merged, name, [*of_all, *of_one]))
        if stages[-1].output in [one.output for one in stages[:-1]]:
            raise ValueError(f"{name}: output must be its own, got {stages[-1].output} again")
    return stages


def _check_keys(path: Path, tree: Any) -> None:
    for key in tree:
        if key not in KEYS:
            raise ValueError(
                f"{path}: a curriculum must have no keys but {', '.join(KEYS)}, got {key!r}"
                f"{near_name(str(key), KEYS)}"
            )
    if not OmegaConf.is_list(tree.stages) or not tree.stages:
        raise ValueError(f"{path}: stages must be a list of at least one, got {tree.stages}")
    for number, entry in enumerate(tree.stages, 1):
        if not OmegaConf.is_dict(entry):
            raise ValueError(
                f"{path}: stage {number} must be `config: FILE` or settings, got {entry!r}"
            )


def _merge(path: Path, tree: Any, number: int, output: str | None) -> tuple[str, Any]:
    """What to call a stage, and its settings as a tree."""
    entry = tree.stages[number - 1]
    own = OmegaConf.create({k: v for k, v in entry.items() if k not in ("config", "name")})
    base = read_yaml(path.parent / entry.config) if "config" in entry else {}
    merged = OmegaConf.merge(base, tree.get("all") or {}, own)
    label = entry.get("name") or Path(str(entry.get("config", "stage"))).stem
    if "output" not in own:
        if output is None:
            raise ValueError(f"{path}: output must be given, got nothing")
        merged.output = f"{output}/{number}_{label}"
    return f"{path}: stage {number} ({label})", merged
