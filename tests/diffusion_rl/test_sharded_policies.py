"""Full fine-tuning in parts over gloo: the same policies, steps and checkpoints as in one piece."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rl import processes
from diffusion_rl.checkpoint import read_checkpoint
from diffusion_rl.full_policies import REFERENCE, FullPolicies, FullSettings
from diffusion_rl.launch import CHECKPOINTS, TUNED, prepare, train
from diffusion_rl.lora import AVERAGE, OLD, TRAINED
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer, spoil_gradient, take_step
from diffusion_rl.policies import attach_full, policies_of
from diffusion_rl.row_settings import GrpoSettings
from diffusion_rl.sharded_policies import ShardedPolicies
from diffusion_rl.sharding import gathered, shard
from diffusion_rl.weight_files import read_transformer
from tests.full_run import full_run
from tests.several import run_on
from tests.tiny_wan import build_tiny_wan

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KEPT = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
ADAM = OptimizerSettings(learning_rate=2e-3, max_grad_norm=0.5)


def attached(
    half: bool, settings: FullSettings, launcher: dict[str, str] | None = None
) -> tuple[nn.Module, FullPolicies]:
    """A tiny Wan that learns, in parts if a launcher asks for it."""
    transformer = build_tiny_wan().transformer
    if half:
        transformer = transformer.bfloat16()
        for name, one in transformer.named_parameters():
            if "scale_shift_table" in name:  # Wan keeps it in float32.
                one.data = one.data.float()
    if launcher is not None:
        shard(transformer, launcher=FSDP | launcher)
    return transformer, attach_full(transformer, settings, (OLD, AVERAGE))


def passed(transformer: nn.Module, number: int) -> Tensor:
    """What it makes of some input."""
    source = torch.Generator().manual_seed(number)
    model: Any = transformer
    own, dtype = model.config, model.patch_embedding.weight.dtype
    latent = torch.randn((1, own.in_channels, 2, 4, 4), generator=source).to(dtype)
    text = torch.randn((1, 12, own.text_dim), generator=source).to(dtype)
    made = model(
        hidden_states=latent, timestep=torch.tensor([500 + number]), encoder_hidden_states=text
    )
    return made[0].float()


def life(transformer: nn.Module, policies: FullPolicies, whole: bool) -> dict[str, Any]:
    """Three steps on the losses of two inputs, of which a process sees one, and all it leads to."""
    optimizer = build_optimizer(policies.parameters(), ADAM)
    seen: dict[str, Any] = {"norms": []}
    own = (0, 1) if whole else (processes.rank(),)
    for step in range(3):
        for number in own:
            passed(transformer, 2 * step + number).square().mean().backward()
        if not whole:
            left = [one for one in policies.parameters() if one not in policies.split]
            processes.add_up_gradients(left)
        seen["norms"].append(take_step(optimizer, policies.split))
        policies.sync()
        policies.follow(OLD, 0.5)
        policies.follow(AVERAGE, 0.9)
    with torch.no_grad():
        seen["made"] = passed(transformer, 9)
    for policy in (REFERENCE, OLD, TRAINED, AVERAGE):
        with policies.use(policy):
            seen[f"made by {policy}"] = passed(transformer, 9)
        seen[policy] = policies.state(policy)
    with torch.no_grad():
        assert torch.equal(passed(transformer, 9), seen["made"])
    seen["optimizer"] = policies.optimizer_state(optimizer)
    return seen


CASES = [
    pytest.param(False, FullSettings(), {}, id="float32"),
    pytest.param(False, FullSettings(targets=("attn1",), copies="cpu"), KEPT, id="some, kept"),
    pytest.param(True, FullSettings(), KEPT, id="half precision, kept"),
]


@pytest.mark.parametrize(("half", "settings", "launcher"), CASES)
def test_parts_live_as_whole_weights_do(
    half: bool, settings: FullSettings, launcher: dict[str, str]
) -> None:
    expected = life(*attached(half, settings), whole=True)

    def in_parts() -> dict[str, Any]:
        transformer, policies = attached(half, settings, launcher)
        assert isinstance(policies, ShardedPolicies)
        held = sum(part.numel() for part in policies.parts.values())
        whole = sum(place.numel() for place in policies.places.values())
        return {**life(transformer, policies, whole=False), "share": held / whole}

    # Gradients of half precision are rounded once more, and Adam's first steps go by their signs.
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-2 if half else 1e-5}
    first, second = run_on(2, in_parts)
    for found in (first, second):
        assert isinstance(found, dict), found
        assert 0.4 < found.pop("share") < 0.75
        optimizer, other = found.pop("optimizer"), expected["optimizer"]
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], **near)
        if found is second:
            continue
        assert optimizer["param_groups"] == other["param_groups"]
        torch.testing.assert_close(optimizer["state"], other["state"], **near)
    for name, value in expected[REFERENCE].items():
        assert torch.equal(first[REFERENCE][name], value)


def on_two(act: Callable[[nn.Module, ShardedPolicies], Any]) -> list[Any]:
    """What two processes give back that hold parts of one transformer."""

    def run() -> Any:
        transformer, policies = attached(False, FullSettings(), {})
        assert isinstance(policies, ShardedPolicies)
        return act(transformer, policies)

    return run_on(2, run)


def test_states_of_whole_weights_come_back_as_parts() -> None:
    base = attached(False, FullSettings())[1].state()
    wanted = {name: torch.randn_like(value) for name, value in base.items()}

    def act(transformer: nn.Module, policies: ShardedPolicies) -> Any:
        policies.set_state(wanted, TRAINED, "here")
        first = policies.state()
        mine = policies.state(everywhere=False)
        model = gathered(transformer)
        with pytest.raises(ValueError, match="here must"):
            policies.set_state({"odd": torch.zeros(1)}, TRAINED, "here")
        return first, mine, model and model.state_dict()

    (state, mine, model), (other, nothing, none) = on_two(act)
    for found in (state, mine, other, model):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert nothing == {}
    assert none is None


def test_an_optimizer_goes_on_from_its_whole_state() -> None:
    def act(transformer: nn.Module, policies: ShardedPolicies) -> Any:
        optimizer = build_optimizer(policies.parameters(), ADAM)
        passed(transformer, processes.rank()).square().mean().backward()
        take_step(optimizer, policies.split)
        found = processes.gather_objects(policies.optimizer_state(optimizer))
        assert found[1]["state"] == {}
        fresh = build_optimizer(policies.parameters(), ADAM)
        fresh.load_state_dict(policies.own_optimizer_state(found[0]))
        for one, other in zip(optimizer.state.values(), fresh.state.values(), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        return len(fresh.state)

    first, second = on_two(act)
    assert first == second > 0


def test_a_gradient_that_is_not_finite_on_one_process_stops_the_step_of_all() -> None:
    def act(transformer: nn.Module, policies: ShardedPolicies) -> Any:
        optimizer = build_optimizer(policies.parameters(), ADAM)
        before = policies.state()
        passed(transformer, 0).square().mean().backward()
        if processes.rank() == 1:
            spoil_gradient(optimizer)
        norm = take_step(optimizer, policies.split)
        after = policies.state()
        return norm, all(torch.equal(after[name], value) for name, value in before.items())

    for found in on_two(act):
        assert str(found) == "(nan, True)", found


@pytest.mark.parametrize("row", ["grpo", "nft"])
def test_a_run_in_parts_is_the_run_in_one_piece(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, then one, then two again; 5 videos, 3 for one process."""
    settings = full_run(tmp_path)
    if row == "grpo":
        rollout = dataclasses.replace(settings.rollout, stochastic_steps=1)
        algorithm = GrpoSettings(kl_weight=0.1, inner_steps=2)
        settings = dataclasses.replace(settings, rollout=rollout, algorithm=algorithm)
    longer = dataclasses.replace(settings, updates=6, output=str(tmp_path / "whole"))
    expected = prepare(longer)
    reports = list(train(expected))
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)

    def go_on(until: int) -> tuple[list[int], bool, float, dict[str, Tensor]]:
        run = prepare(dataclasses.replace(settings, updates=until))
        done = list(train(run))
        policies = policies_of(run.generator.transformer)
        in_parts = bool(policies.split)
        return [one.step for one in done], in_parts, done[-1].reward, policies.state()

    for count, until in ((2, 3), (1, 4), (2, 6)):
        for found in run_on(count, lambda: go_on(until)):  # noqa: B023
            assert isinstance(found, tuple), found
            assert found[0][-1] == until
            assert found[1] == (count == 2)
            assert found[2] == pytest.approx(reports[until - 1].reward, abs=1e-6)
    state = policies_of(expected.generator.transformer).state()
    # Adam goes by the signs of its first gradients, of which the smallest are rounding alone.
    torch.testing.assert_close(found[3], state, rtol=0, atol=1e-4)
    base = policies_of(expected.generator.transformer).state(REFERENCE)
    assert max((state[name] - base[name]).abs().max() for name in state) > 1e-3
    here, there = Path(settings.output), Path(longer.output)
    own, other = (read_checkpoint(one / CHECKPOINTS / "step-000006") for one in (here, there))
    assert own.files.keys() == other.files.keys()
    tuned, whole = (read_transformer(one / TUNED / "transformer") for one in (here, there))
    torch.testing.assert_close(tuned, whole, rtol=0, atol=1e-4)
