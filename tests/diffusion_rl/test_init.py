"""The package exports what it promises, and importing it loads no heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import diffusion_rl

HEAVY = ("torch", "diffusers", "transformers", "peft", "trl", "accelerate", "cac_reward")


def loaded_after(statement: str) -> set[str]:
    """The heavy packages a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_export_exists_in_its_home():
    homes = [name for names in diffusion_rl._HOMES.values() for name in names]
    assert sorted(homes) == sorted(diffusion_rl.__all__) == dir(diffusion_rl)
    for name in diffusion_rl.__all__:
        assert getattr(diffusion_rl, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'diffusion_rl' has no attribute 'grpo'"):
        diffusion_rl.grpo  # noqa: B018


def test_importing_the_package_is_light():
    assert loaded_after("import diffusion_rl") == set()


def test_the_pure_modules_need_torch_only():
    modules = ("transitions", "advantages", "losses", "algorithms", "guards", "rewards")
    statement = "; ".join(f"import diffusion_rl.{name}" for name in modules)
    assert loaded_after(statement) == {"torch"}


def test_the_check_for_light_imports_can_fail():
    assert "accelerate" in loaded_after("import accelerate")
