"""A step that could not be taken, kept and run once more."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_rl import processes
from diffusion_rl.checkpoint import latest_checkpoint, read_checkpoint
from diffusion_rl.credit import Credit
from diffusion_rl.faults import DESCRIPTION, INPUTS, load_fault, replay_fault, save_fault
from diffusion_rl.full_policies import FullSettings
from diffusion_rl.launch import CHECKPOINTS, FAULTS, build_generator, prepare, train
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer
from diffusion_rl.policies import (
    attach_policies,
    policies_of,
    trained_parameters,
    update_old_policy,
)
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import AwmSettings, GrpoSettings, NftSettings, OnlineDpoSettings
from diffusion_rl.step_losses import StepInputs, optimizer_steps
from diffusion_rl.transitions import flow_sde, ode
from diffusion_rl.updates import NotFiniteError, update_policy
from tests.diffusion_rl.test_weight_files import run_settings
from tests.tiny_wan import save_tiny_wan
from tests.toy_gaussian import LORA, ToyGenerator

OPTIONS = RolloutSettings(num_inference_steps=4, stochastic_steps=2, micro_batch=2)


def draw(generator: ToyGenerator, row: AlgorithmSettings) -> Trajectory:
    recorded = isinstance(row, GrpoSettings)
    trajectory = rollout(
        generator,
        generator.encode_prompts(["plain", "bright"]),
        torch.arange(4) % 2,
        range(4),
        OPTIONS,
        transition=flow_sde if recorded else ode,
        stochastic=torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]]) if recorded else (),
    )
    return dataclasses.replace(trajectory, group=torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("learner", [LORA, FullSettings()])
@pytest.mark.parametrize(
    "row",
    [
        GrpoSettings(kl_weight=0.1),
        NftSettings(inner_steps=2, noise_levels=2),
        AwmSettings(inner_steps=2, noise_levels=2),
        OnlineDpoSettings(inner_steps=2, noise_levels=2),
    ],
)
def test_the_step_is_run_again_as_it_was(
    row: AlgorithmSettings, learner: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient limit of infinity lets the last step through; its gradient is the expected one."""
    generator = ToyGenerator()
    old = row.name != "grpo"
    attach_policies(generator.transformer, learner, old_policy=old)
    with torch.no_grad():
        for parameter in trained_parameters(generator.transformer):
            parameter.normal_(std=0.1)
    if old:  # Otherwise it would be the old policy that a fresh generator has.
        update_old_policy(generator.transformer, 0.5)
    trajectory = draw(generator, row)
    weights = torch.rand(4, *trajectory.final_latent.shape[2:]) + 0.5
    weights = weights / weights.flatten(1).mean(1).view(4, 1, 1, 1)
    credit = Credit(torch.tensor([1.0, -0.5, 0.25, -1.5]), weights)
    parameters = trained_parameters(generator.transformer)
    optimizer = build_optimizer(parameters, OptimizerSettings(learning_rate=1e-2, skip_limit=0))
    steps = []

    def take(optimizer: torch.optim.Optimizer, split: object) -> float:
        """The first of two steps is taken, the last is called a fault."""
        steps.append([parameter.grad.clone() for parameter in parameters])
        if len(steps) < row.inner_steps:
            optimizer.step()
            optimizer.zero_grad()
            return 1.0
        optimizer.param_groups[0]["skipped_in_a_row"] = 1
        return math.nan

    monkeypatch.setattr("diffusion_rl.updates.take_step", take)
    with pytest.raises(NotFiniteError) as raised:
        update_policy(
            *(generator, trajectory, credit, row, OPTIONS, optimizer),
            torch.Generator().manual_seed(5),
        )
    met = policies_of(generator.transformer).state()
    save_fault(tmp_path / "fault", generator, raised.value.inputs, "norm nan")
    assert [path.name for path in tmp_path.iterdir()] == ["fault"]

    other = ToyGenerator()
    attach_policies(other.transformer, learner, old_policy=old)
    result = replay_fault(other, tmp_path / "fault")
    found = policies_of(other.transformer)
    assert all(torch.equal(value, met[name]) for name, value in found.state().items())
    for parameter, gradient in zip(found.parameters(), steps[-1], strict=True):
        assert torch.equal(parameter.grad, gradient)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in steps[-1]))
    assert result.gradient_norm == pytest.approx(norm)
    assert result.not_finite == ()
    assert len(result.losses) == 4  # Two micro batches, two recorded steps or noise levels.


def test_a_share_of_a_loss_of_groups_is_not_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, row = ToyGenerator(), OnlineDpoSettings()
    attach_policies(generator.transformer, LORA, old_policy=True)
    trajectory = draw(generator, row)
    source = torch.Generator().manual_seed(0)
    (step,) = optimizer_steps(generator, trajectory, row, OPTIONS, source)
    inputs = StepInputs(trajectory, Credit(torch.ones(4)), row, OPTIONS, step)
    save_fault(tmp_path / "alone", generator, inputs, "norm nan")
    monkeypatch.setattr(processes, "team_count", lambda: 2)
    save_fault(tmp_path / "share", generator, inputs, "norm nan")
    replay_fault(generator, tmp_path / "alone")
    with pytest.raises(ValueError, match="with algorithm 'online_dpo', got one of 2 shares in"):
        replay_fault(generator, tmp_path / "share")
    assert load_fault(tmp_path / "share").settings == row


@pytest.mark.parametrize("learner", [{"lora": {"rank": 2}, "full": None}, {}])
def test_a_run_stops_past_the_limit_with_its_inputs_and_its_last_good_checkpoint(
    learner: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    settings = run_settings(
        folder,
        tmp_path,
        algorithm={"name": "grpo"},
        optimizer={"skip_limit": 1},
        updates=9,
        save_every=1,
        **learner,
    )
    run = prepare(settings)
    poison = Poison(run.generator)
    monkeypatch.setattr(run.generator, "predict", poison)
    done = []
    output = Path(settings.output)
    place = output / FAULTS / "update-000004-process-0"
    reports = train(run)
    for report in itertools.islice(reports, 3):
        done.append(report)
        poison.active = report.step >= 2
    with pytest.raises(NotFiniteError, match=f"2 optimiser steps in a row; .* are in {place}"):
        next(reports)
    assert [report.skipped_steps for report in done] == [0, 0, 1]
    newest = latest_checkpoint(output / CHECKPOINTS)
    assert read_checkpoint(newest).step == 3
    generator = build_generator(settings.generator)
    attach_policies(generator.transformer, settings.learner)
    healthy = replay_fault(generator, place)  # The fault was in predict, and is gone.
    assert math.isfinite(healthy.gradient_norm)
    monkeypatch.setattr(generator, "predict", Poison(generator, active=True))
    again = replay_fault(generator, place)
    assert math.isnan(again.gradient_norm)
    assert again.not_finite
    assert len(again.losses) == len(healthy.losses)


class Poison:
    """A prediction that is not finite where gradients are asked for, as of an overflow."""

    def __init__(self, generator: object, active: bool = False) -> None:
        self.predict, self.active = generator.predict, active

    def __call__(self, *inputs: object) -> Tensor:
        velocity = self.predict(*inputs)
        if self.active and torch.is_grad_enabled():
            return velocity * math.inf
        return velocity


def test_what_is_no_fault_is_refused(tmp_path: Path) -> None:
    row = GrpoSettings()
    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA)
    optimizer = build_optimizer(
        trained_parameters(generator.transformer), OptimizerSettings(skip_limit=0)
    )
    broken = Credit(torch.full((4,), math.nan))
    with pytest.raises(NotFiniteError) as raised:
        update_policy(
            *(generator, draw(generator, row), broken, row, OPTIONS, optimizer), torch.Generator()
        )
    folder = save_fault(tmp_path / "fault", generator, raised.value.inputs, "norm nan")
    inputs = load_fault(folder)
    assert inputs.settings == row
    assert inputs.rollout == OPTIONS
    assert replay_fault(generator, folder).not_finite
    with pytest.raises(FileNotFoundError, match=f"fault must be a folder with an {DESCRIPTION}"):
        load_fault(tmp_path)
    stranger = ToyGenerator()
    attach_policies(stranger.transformer, dataclasses.replace(LORA, rank=3))
    with pytest.raises(ValueError, match="fault .* must fit the generator's transformer"):
        replay_fault(stranger, folder)
    described = json.loads((folder / DESCRIPTION).read_text())
    assert described["message"] == "norm nan"
    (folder / DESCRIPTION).write_text(json.dumps(described | {"version": 9}))
    with pytest.raises(ValueError, match="fault must be of version 2, got 9"):
        load_fault(folder)
    (folder / INPUTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="fault must be complete, got"):
        load_fault(folder)
