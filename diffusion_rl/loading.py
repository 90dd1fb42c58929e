"""What a configuration names by its import path, found or refused helpfully."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def load_callable(target: str) -> Callable[..., Any]:
    """Import what a configuration names, or say which half of the name is wrong.

    Args:
        target: "module:name" or "module:Name.attribute".

    Raises:
        ValueError: The text has not this form, or names something that cannot be called.
        ImportError: The module or the name in it does not exist, or the module fails to import.

    Example:
        >>> load_callable("math:sqrt")(9)
        3.0
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"target must be 'module:name', got '{target}'")
    found: Any = _import_module(target, module_name)
    walked = f"module '{module_name}'"
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(
                f"target '{target}': {walked} has no '{part}'{near_names(part, dir(found))}"
            )
        found = getattr(found, part)
        walked = f"'{part}' of {walked}"
    if not callable(found):
        raise ValueError(f"target '{target}' must be callable, got {type(found).__name__}")
    return found


def _import_module(target: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ImportError(
                f"target '{target}': module '{module_name}' was found, but importing it failed "
                f"because it needs '{missing}', which is not installed"
            ) from error
        parent, _, last = missing.rpartition(".")
        folders = getattr(importlib.import_module(parent), "__path__", []) if parent else None
        names = [module.name for module in pkgutil.iter_modules(folders)]
        raise ImportError(
            f"target '{target}': there is no module '{missing}'{near_names(last, names)}; "
            "it is looked for among installed packages and on PYTHONPATH"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"target '{target}': module '{module_name}' was found, but importing it failed: {error}"
        ) from error


def near_names(name: str, known: Any) -> str:
    """The end of an error: names that the writer may have meant."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; near names: {', '.join(matches)}" if matches else ""
