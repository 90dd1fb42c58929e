"""A curriculum: the stages of one YAML, each beginning with the judge of the one before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cac_reward.training.rules import near_name, wrong_value
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
    tree = _read_keys(path)
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
            output = _output_of(override)
        else:
            rest.append(override)
    stages: list[StageSettings] = []
    for number in range(1, len(tree.stages) + 1):
        name, merged = _merge(path, tree, number, output)
        of_all = [one for one in rest if not _NUMBERED.fullmatch(one)]
        if _begins_with(merged, name) == PREVIOUS:
            if not stages:
                raise ValueError(f"{name}: model.path must be a judge for the first stage")
            merged.model.path = f"{stages[-1].output}/{JUDGE}"
            of_all = [one for one in of_all if not one.startswith("model.path=")]
        of_one = [one.partition(".")[2] for one in rest if one.startswith(f"{number}.")]
        stages.append(build_stage(merged, name, [*of_all, *of_one]))
        if stages[-1].output in [one.output for one in stages[:-1]]:
            raise ValueError(f"{name}: output must be its own, got {stages[-1].output} again")
    return stages


def _read_keys(path: Path) -> Any:
    """A YAML file with keys."""
    tree = read_yaml(path)
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: config must have keys, got a list")
    return tree


def _begins_with(tree: Any, name: str) -> Any:
    try:
        return OmegaConf.select(tree, "model.path")
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {wrong_value(error)}") from error


def _output_of(override: str) -> str:
    try:
        output = str(OmegaConf.from_dotlist([override]).output)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"overrides must have values in YAML, got {override!r}") from error
    if not output.strip():
        raise ValueError(f"overrides must name a folder as output, got {override!r}")
    return output


def _check_keys(path: Path, tree: Any) -> None:
    for key in tree:
        if key not in KEYS:
            raise ValueError(
                f"{path}: a curriculum must have no keys but {', '.join(KEYS)}, got {key!r}"
                f"{near_name(str(key), KEYS)}"
            )
    stages, of_all = (_value(str(path), tree, key) for key in ("stages", "all"))
    if not OmegaConf.is_list(stages) or not stages:
        raise ValueError(f"{path}: stages must be a list of at least one, got {stages}")
    if of_all is not None and not OmegaConf.is_dict(of_all):
        raise ValueError(f"{path}: all must be settings with keys, got {of_all}")
    output = _value(str(path), tree, "output")
    if output is not None and (not isinstance(output, str) or not output.strip()):
        raise ValueError(f"{path}: output must be the name of a folder, got {output!r}")
    for number in range(1, len(stages) + 1):
        _check_entry(f"{path}: stage {number}", stages, number - 1)


def _check_entry(name: str, stages: Any, at: int) -> None:
    entry = _value(name, stages, at)
    if not OmegaConf.is_dict(entry):
        raise ValueError(f"{name} must be `config: FILE` or settings, got {entry!r}")
    for key in entry:
        value = _value(name, entry, key)
        if key in ("config", "name") and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{name}: {key} must be text, got {value!r}")


def _value(name: str, node: Any, key: Any) -> Any:
    """What stands at a key, or a refusal that names it where it refers to what is not there."""
    try:
        return node[key] if OmegaConf.is_list(node) else node.get(key)
    except OmegaConfBaseException as error:
        place = "" if OmegaConf.is_list(node) else f"{key}: "
        raise ValueError(f"{name}: {place}{str(error).splitlines()[0]}") from error


def _merge(path: Path, tree: Any, number: int, output: str | None) -> tuple[str, Any]:
    """What to call a stage, and its settings as a tree."""
    entry = tree.stages[number - 1]
    own = OmegaConf.create({k: v for k, v in entry.items() if k not in ("config", "name")})
    base = _read_keys(path.parent / entry.config) if "config" in entry else OmegaConf.create()
    label = entry.get("name") or Path(str(entry.get("config", "stage"))).stem
    name = f"{path}: stage {number} ({label})"
    merged = base
    for layer in (tree.get("all") or OmegaConf.create(), own):
        keys: list[Any] = list(layer)
        for key in keys:
            try:
                merged = OmegaConf.merge(merged, OmegaConf.masked_copy(layer, [key]))
            except TypeError as error:
                raise ValueError(
                    f"{name}: {key} must be of one kind, got a list and keys"
                ) from error
            except OmegaConfBaseException as error:
                raise ValueError(f"{name}: {wrong_value(error)}") from error
    if "output" not in own:
        if output is None:
            raise ValueError(f"{path}: output must be given, got nothing")
        merged.output = f"{output}/{number}_{label}"
    return name, merged
