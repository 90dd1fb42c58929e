"""DeepSpeed's ZeRO over gloo: the same weights, state and checkpoints as without it."""

import copy
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rl import processes, zero
from diffusion_rl.checkpoint import read_checkpoint
from diffusion_rl.launch import CHECKPOINTS, prepare, train
from diffusion_rl.lora import LoraSettings
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer, spoil_gradient, take_step
from diffusion_rl.policies import policies_of
from diffusion_rl.zero import ZeroOptimizer, check_zero, wants_zero
from tests.full_run import full_run
from tests.several import run_on

# Not imported here: it would find out about this machine before a test says what to take.
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
ADAM = OptimizerSettings(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)
SHAPES = ((3, 5), (7,), (4, 4))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` with DeepSpeed leaves the environment."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


def steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, *seeds: int) -> list[Any]:
    """Norms of steps on random gradients, which are the same everywhere; the third is spoilt."""
    norms = []
    for seed in seeds:
        source = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=source)
        if seed == 2:
            spoil_gradient(optimizer)
        norms.append(take_step(optimizer))
    return norms


def life(parts: bool, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Six steps, of which the last two are made twice, from what was kept before them.

    Args:
        parts: by DeepSpeed.
        state: of the optimiser after four steps, to go on from in place of its own.
    """
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]

    def optimizer() -> torch.optim.Optimizer:
        made = build_optimizer(weights, ADAM)
        return ZeroOptimizer(made) if parts else made

    first = optimizer()
    seen: dict[str, Any] = {"norms": steps(weights, first, 0, 1, 2, 3)}
    # Copies: an optimiser takes and gives its moments as they are, and moves them.
    seen["state"] = state or processes.gather_objects(copy.deepcopy(first.state_dict()))[0]
    kept = [weight.detach().clone() for weight in weights]
    seen["norms"] += steps(weights, first, 4, 5)
    seen["weights"] = [weight.detach().clone() for weight in weights]
    for weight, value in zip(weights, kept, strict=True):
        weight.data = value.clone()
    second = optimizer()
    second.load_state_dict(copy.deepcopy(seen["state"]))
    assert second.param_groups[0]["lr"] == ADAM.learning_rate
    steps(weights, second, 4, 5)
    for weight, value in zip(weights, seen["weights"], strict=True):
        assert torch.equal(weight, value)
    return seen


@needs_deepspeed
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("count", [2, 3])
def test_parts_move_as_the_whole_does(count: int) -> None:
    expected = life(parts=False)
    for found in run_on(count, lambda: life(parts=True)):
        assert isinstance(found, dict), found
        assert str(found["norms"]) == str(expected["norms"])
        assert found["state"]["param_groups"] == expected["state"]["param_groups"]
        for name in ("weights", "state"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
    # And on from the state of an optimiser that was not in parts.
    for found in run_on(count, lambda: life(parts=True, state=expected["state"])):
        assert isinstance(found, dict), found


@needs_deepspeed
@pytest.mark.usefixtures("launched")
def test_every_process_holds_a_part_of_the_state() -> None:
    def held() -> tuple[int, int]:
        weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = ZeroOptimizer(build_optimizer(weights, ADAM))
        steps(weights, optimizer, 0)
        (state,) = optimizer._parts.state.values()
        return state["exp_avg"].numel(), len(optimizer.state_dict()["state"])

    whole = sum(torch.Size(shape).numel() for shape in SHAPES)
    (first, known), (second, unknown) = run_on(2, held)
    assert first == second
    assert whole / 2 <= first < whole * 0.6
    assert (known, unknown) == (len(SHAPES), 0)


@needs_deepspeed
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("learner", ["lora", "full", "half"])
def test_a_run_in_parts_is_the_run_in_one_piece(learner: str, tmp_path: Path) -> None:
    """Two processes, then one, then two again; 5 videos, 3 for one process."""
    settings = full_run(tmp_path)
    if learner == "lora":
        settings = dataclasses.replace(settings, full=None, lora=LoraSettings(rank=2))
    if learner == "half":
        generator = dataclasses.replace(settings.generator, dtype="bfloat16")
        settings = dataclasses.replace(settings, generator=generator)
    longer = dataclasses.replace(settings, updates=6, output=str(tmp_path / "whole"))
    expected = prepare(longer)
    reports = list(train(expected))

    def go_on(until: int) -> tuple[list[int], bool, float, dict[str, Tensor]]:
        run = prepare(dataclasses.replace(settings, updates=until))
        done = list(train(run))
        policies = policies_of(run.generator.transformer)
        in_parts = isinstance(run.state.optimizer, ZeroOptimizer)
        return [one.step for one in done], in_parts, done[-1].reward, policies.state()

    # Adam goes by the signs of its first gradients, of which the smallest are rounding alone.
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-2 if learner == "half" else 1e-4}
    for count, until in ((2, 3), (1, 4), (2, 6)):
        for found in run_on(count, lambda: go_on(until)):  # noqa: B023
            assert isinstance(found, tuple), found
            assert found[0][-1] == until
            assert found[1] == (count == 2)
            assert abs(found[2] - reports[until - 1].reward) < near["atol"]
    state = policies_of(expected.generator.transformer).state()
    torch.testing.assert_close(found[3], state, **near)
    own, other = (
        read_checkpoint(Path(one.output) / CHECKPOINTS / "step-000006")
        for one in (settings, longer)
    )
    assert own.files.keys() == other.files.keys()


def test_only_what_the_launcher_asks_for_is_done() -> None:
    assert not wants_zero({})
    assert not wants_zero({"ACCELERATE_USE_FSDP": "true"})
    assert wants_zero({"ACCELERATE_USE_DEEPSPEED": "true"})


class Plugin:
    """What accelerate reads from a launcher, without DeepSpeed."""

    def __init__(self, stage: int, **parts: str) -> None:
        devices = {part: {"device": device} for part, device in parts.items()}
        self.deepspeed_config = {"zero_optimization": {"stage": stage, **devices}}


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: Any, **parts: str) -> None:
        monkeypatch.setattr(zero, "DeepSpeedPlugin", lambda: Plugin(*words, **parts))

    monkeypatch.setattr(zero, "_deepspeed", object)
    for stage in (1, 2):
        asked(stage, offload_optimizer="none")
        check_zero("adamw")
    with pytest.raises(ValueError, match=r"optimizer.name must be one of adamw with .*, got muon"):
        check_zero("muon")
    asked(3)
    with pytest.raises(ValueError, match="zero_stage must be 1 or 2, got 3; configs/accelerate/fs"):
        check_zero("adamw")
    asked(2, offload_optimizer="cpu")
    with pytest.raises(ValueError, match="offload_optimizer_device must be none, got cpu; set"):
        check_zero("adamw")


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r'needs deepspeed; install it with: pip install "\.\[de'):
        check_zero("adamw")


@needs_deepspeed
def test_another_device_than_the_weights_is_refused() -> None:
    class Elsewhere:
        @staticmethod
        def get_accelerator() -> Any:
            return type("Gpu", (), {"device_name": staticmethod(lambda: "cuda")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "_deepspeed", lambda: type("Library", (), {"accelerator": Elsewhere}))
        with pytest.raises(ValueError, match="got cpu and cuda; set DS_ACCELERATOR=cpu"):
            ZeroOptimizer(build_optimizer([nn.Parameter(torch.ones(2))], ADAM))
