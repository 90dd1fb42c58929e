"""The inputs of an optimiser step that could not be taken, as files, and the step once more.

A folder holds `inputs.json` (the row, its options, what is no tensor), `inputs.safetensors` and
`weights.safetensors` (of every policy that takes part, as the step met them).

Axes: B videos.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rl import processes
from diffusion_rl.algorithms import algorithm
from diffusion_rl.credit import Credit
from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.lora import OLD, TRAINED
from diffusion_rl.noising import NoisedVideos
from diffusion_rl.policies import policies_of
from diffusion_rl.rollout import RolloutSettings, Trajectory
from diffusion_rl.row_settings import SETTINGS
from diffusion_rl.step_losses import LossTerms, OptimizerStep, StepInputs
from diffusion_rl.transitions import TRANSITIONS, name_of
from diffusion_rl.updates import accumulate

VERSION = 2
DESCRIPTION, INPUTS, WEIGHTS = "inputs.json", "inputs.safetensors", "weights.safetensors"
RECORDED = (
    *("latents", "next_latents", "means", "log_probs", "log_prob_maps"),
    *("steps", "sigmas", "final_latent", "prompt_index", "rows"),
)
"""Tensors of a trajectory that a step reads; its videos are not among them."""
TEXT, EMPTY_TEXT = "conditional_extras", "unconditional_extras"


@dataclass(frozen=True)
class ReplayedFault:
    """What the step did when it was computed once more."""

    losses: tuple[float, ...]
    """Of each micro batch at each recorded step or noise level, in turn."""
    gradient_norm: float
    """Of all weights that learn; not finite if the fault shows again."""
    not_finite: tuple[str, ...]
    """Names of the weights whose gradient is not finite."""


def save_fault(
    folder: str | Path, generator: AbstractVideoGenerator, inputs: StepInputs, message: str
) -> Path:
    """Write a step's inputs, and the weights as they are, so that `replay_fault` can run it.

    Args:
        folder: is made; what it held before is replaced.
        generator: carries the weights that the step met.
        inputs: from the `NotFiniteError`.
        message: what was wrong.

    Returns:
        The folder.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policies = policies_of(generator.transformer)
    own = [policy for policy in (TRAINED, OLD) if policies.has(policy)]
    weights = {
        f"{policy}/{name}": value
        for policy in own
        for name, value in policies.state(policy).items()
    }
    save_file(weights, partial / WEIGHTS)
    save_file(_tensors_of(inputs), partial / INPUTS)
    description = {
        "version": VERSION,
        "message": message,
        "torch": torch.__version__,
        "algorithm": asdict(inputs.settings),
        "rollout": asdict(inputs.rollout),
        "transition": name_of(inputs.trajectory.transition),
        "processes": processes.team_count(),
        "seeds": list(inputs.trajectory.seeds),
        "clip": inputs.credit.clip,
        "total": inputs.trajectory.total,
        "videos": inputs.step.videos,
        "parts": [[part.start, part.stop] for part in inputs.step.parts],
    }
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def load_fault(folder: str | Path, device: torch.device | str = "cpu") -> StepInputs:
    """Read a step's inputs back, to the bit.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is damaged, or of another version.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"fault must be a folder with an {DESCRIPTION}, got {folder}")
    try:
        described = json.loads((folder / DESCRIPTION).read_bytes())
        found = load_file(folder / INPUTS, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"fault must be complete, got {folder}: {error}") from error
    if described.get("version") != VERSION:
        raise ValueError(
            f"fault must be of version {VERSION}, got {described.get('version')} in {folder}"
        )
    count = len(found["final_latent"])
    trajectory = Trajectory(
        **{name: found[name] for name in RECORDED},
        group=found["group"].cpu() if "group" in found else None,
        videos=torch.zeros(count, 0, 3, 1, 1),
        embeddings=PromptEmbeddings(
            found["conditional"],
            found["unconditional"],
            _below(found, TEXT),
            _below(found, EMPTY_TEXT),
        ),
        seeds=tuple(described["seeds"]),
        transition=TRANSITIONS[described["transition"]],
        total=described["total"],
    )
    algorithm = described["algorithm"]
    latents, sigmas = _below(found, "noised_latent"), _below(found, "noised_sigma")
    before = _below(found, "before")
    return StepInputs(
        trajectory,
        Credit(found["advantages"], found.get("weights"), described["clip"]),
        SETTINGS[algorithm["name"]](**algorithm),
        RolloutSettings(**described["rollout"]),
        OptimizerStep(
            described["videos"],
            tuple(slice(start, stop) for start, stop in described["parts"]),
            tuple(NoisedVideos(latents[name], sigmas[name]) for name in latents),
            tuple(before.values()),
        ),
    )


def replay_fault(generator: AbstractVideoGenerator, folder: str | Path) -> ReplayedFault:
    """Compute a step's losses and gradient once more, with the weights that it met; take no step.

    The generator keeps those weights and the gradient, to be looked at.

    Args:
        generator: with what learns attached as in the run (`attach_policies`).
        folder: from `save_fault`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is damaged, of another model or other settings of what learns, or one
            process's share of a step whose loss compares the videos of several.
    """
    inputs = load_fault(folder, generator.device)
    check_whole(inputs, folder)
    policies = policies_of(generator.transformer)
    try:
        weights = load_file(Path(folder) / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"fault must be complete, got {folder}: {error}") from error
    for policy in (TRAINED, OLD):
        if policies.has(policy):
            policies.set_state(_below(weights, policy), policy, f"fault {folder}")
    parameters = dict(zip(policies.state(), policies.parameters(), strict=True))
    for parameter in parameters.values():
        parameter.grad = None
    terms: list[LossTerms] = accumulate(generator, inputs)
    gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
    return ReplayedFault(
        losses=tuple(one.loss.item() for one in terms),
        gradient_norm=torch.nn.utils.get_total_norm(list(gradients.values())).item(),
        not_finite=tuple(name for name, one in gradients.items() if not one.isfinite().all()),
    )


def check_whole(inputs: StepInputs, folder: str | Path) -> None:
    """Refuse a share of a step that says nothing without the shares of other processes.

    Raises:
        ValueError: it is one.
    """
    described = json.loads((Path(folder) / DESCRIPTION).read_bytes())
    row = algorithm(inputs.settings.name)
    if (row.of_groups or row.needs_directions) and described["processes"] > 1:
        raise ValueError(
            "fault must be of one process to be run again with algorithm "
            f"'{inputs.settings.name}', got one of {described['processes']} shares in {folder}; "
            "its loss compares the videos of all of them, so look at its inputs by load_fault"
        )


def _tensors_of(inputs: StepInputs) -> dict[str, Tensor]:
    trajectory, credit, step = inputs.trajectory, inputs.credit, inputs.step
    text = trajectory.embeddings
    found: dict[str, Tensor] = {name: getattr(trajectory, name) for name in RECORDED}
    found |= {"conditional": text.conditional, "unconditional": text.unconditional}
    found |= {f"{TEXT}/{name}": one for name, one in text.conditional_extras.items()}
    found |= {f"{EMPTY_TEXT}/{name}": one for name, one in text.unconditional_extras.items()}
    found["advantages"] = credit.advantages
    if credit.weights is not None:
        found["weights"] = credit.weights
    if trajectory.group is not None:
        found["group"] = trajectory.group
    for level, noised in enumerate(step.noised):
        found |= {
            f"noised_latent/{level:04d}": noised.latent,
            f"noised_sigma/{level:04d}": noised.sigma,
        }
    found |= {f"before/{level:04d}": one for level, one in enumerate(step.before)}
    # Copies: safetensors refuses tensors that share memory.
    return {name: one.detach().cpu().clone().contiguous() for name, one in found.items()}


def _below(found: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Entries `folder/name` by name, in the order of their names."""
    start = f"{folder}/"
    return {
        name.removeprefix(start): found[name] for name in sorted(found) if name.startswith(start)
    }
