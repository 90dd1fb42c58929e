"""Optimisers by name, learning rates over a run, and what a step does with a bad gradient."""

import copy
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffusion_rl.finetune import FinetuneSettings
from diffusion_rl.optimizers import (
    FROM_BITSANDBYTES,
    OPTIMIZERS,
    OptimizerSettings,
    build_optimizer,
    spoil_gradient,
    take_step,
)

NOT_THERE = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# On the CPU it keeps paged states where they are, and says so.
UNPAGED = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
EACH = [
    pytest.param(name, marks=(NOT_THERE, UNPAGED)) if name in FROM_BITSANDBYTES else name
    for name in OPTIMIZERS
]


def test_adams_second_memory_is_as_long_as_asked_for() -> None:
    """After a gradient of 1 a long one of 0.01 moves more where the first is forgotten sooner."""
    moved = {}
    for beta2 in (0.5, 0.999):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = build_optimizer([weight], OptimizerSettings(adam_beta2=beta2))
        second = torch.zeros(1)
        for gradient in [1.0, 0.01, 0.01, 0.01, 0.01]:
            weight.grad = torch.tensor([gradient])
            before = weight.item()
            optimizer.step()
            second = beta2 * second + (1 - beta2) * gradient**2
            moved[beta2] = abs(weight.item() - before)
        assert optimizer.state[weight]["exp_avg_sq"].item() == pytest.approx(second.item())
    assert moved[0.5] > moved[0.999]


def weights() -> list[nn.Parameter]:
    """A matrix, a bias, the five axes of a patch embedding, and a matrix large enough for states
    of 8 bits."""
    source = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (6,), (3, 2, 1, 2, 2), (80, 64))
    return [nn.Parameter(torch.randn(shape, generator=source)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=source)
    take_step(optimizer)


@pytest.mark.parametrize("name", EACH)
def test_every_optimiser_moves_all_and_resumes_to_the_bit(name: str) -> None:
    settings = OptimizerSettings(name=name, learning_rate=0.01)
    parameters, others = weights(), weights()
    optimizer = build_optimizer(parameters, settings)
    for seed in range(4):
        if seed == 2:
            resumed = build_optimizer(others, settings)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for one, other in zip(others, parameters, strict=True):
                one.data.copy_(other.data)
        before = [parameter.detach().clone() for parameter in parameters]
        step(optimizer, parameters, seed)
        assert not any(map(torch.equal, before, parameters))
        if seed >= 2:
            step(resumed, others, seed)
            assert all(map(torch.equal, others, parameters))
    kept = optimizer.state[parameters[3]].values()
    types = {one.dtype for one in kept if isinstance(one, Tensor)}
    assert (torch.uint8 in types) == name.endswith("8bit")


@pytest.mark.parametrize("name", EACH)
def test_every_optimiser_takes_the_rate_that_a_schedule_gives_it(name: str) -> None:
    moved = []
    for rate in (0.0, 1e-3, 2e-3):
        parameters = weights()
        optimizer = build_optimizer(parameters, OptimizerSettings(name=name))
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(optimizer, parameters, 0)
        pairs = zip(weights(), parameters, strict=True)
        moved.append([(one - other).abs().max().item() for one, other in pairs])
    assert moved[0] == [0.0] * 4
    assert moved[2] == pytest.approx([2 * one for one in moved[1]], rel=1e-3)


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere() -> None:
    settings = OptimizerSettings(name="muon", learning_rate=0.01, weight_decay=0.1, adam_beta2=0.9)
    own, parameters = weights(), weights()
    matrices = [one for one in parameters if one.ndim == 2]
    others = [one for one in parameters if one.ndim != 2]
    optimizer = build_optimizer(own, settings)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.9))
    for seed in range(3):
        step(optimizer, own, seed)
        source = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=source)
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)  # One norm over both parts.
        muon.step()
        adamw.step()
    assert all(map(torch.equal, own, parameters))
    only = build_optimizer(weights()[:1], settings)
    assert len(only.param_groups) == 1


@pytest.mark.parametrize("name", FROM_BITSANDBYTES)
def test_optimisers_of_bitsandbytes_are_asked_of_it_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OptimizerSettings(name=name, learning_rate=0.01, weight_decay=0.1)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"name={name} needs bitsandbytes; .*\[quantization\]"):
        build_optimizer(weights(), settings)
    stand_in = type(FROM_BITSANDBYTES[name], (torch.optim.AdamW,), {})
    package = SimpleNamespace(optim=SimpleNamespace(**{FROM_BITSANDBYTES[name]: stand_in}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    optimizer = build_optimizer(weights(), settings)
    assert type(optimizer) is stand_in
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.01, 0.1, (0.9, 0.999))


@pytest.mark.gpu
@NOT_THERE
@pytest.mark.parametrize("name", FROM_BITSANDBYTES)
def test_optimisers_of_bitsandbytes_move_weights(name: str) -> None:
    parameters = [nn.Parameter(one.detach().cuda()) for one in weights()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = build_optimizer(parameters, OptimizerSettings(name=name))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    take_step(optimizer)
    assert not any(map(torch.equal, before, parameters))


def test_learning_rates_rise_and_fall_as_the_schedule_says() -> None:
    def rates(**options: object) -> list[float]:
        settings = OptimizerSettings(learning_rate=1.0, **options)
        return [settings.learning_rate_at(update, 9) for update in range(1, 10)]

    assert rates() == rates(schedule="constant") == [1.0] * 9
    assert rates(final_share=0.2) == pytest.approx([1 - 0.1 * n for n in range(9)])
    warm = rates(final_share=0.5, warmup_updates=3)
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    cosine = rates(schedule="cosine", final_share=0.2, warmup_updates=1)
    expected = [0.6 + 0.4 * math.cos(math.pi * n / 7) for n in range(8)]
    assert cosine == pytest.approx([0.5, *expected])
    assert OptimizerSettings(learning_rate=1.0).learning_rate_at(1, 1) == 1.0


def test_warm_up_must_end_within_the_run() -> None:
    with pytest.raises(ValueError, match="warmup_updates must be below updates=4, got 4"):
        FinetuneSettings(optimizer=OptimizerSettings(warmup_updates=4), updates=4)


def test_a_gradient_is_spoilt_for_whoever_adds_it_up() -> None:
    parameters = weights()
    optimizer = build_optimizer(parameters, OptimizerSettings())
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    spoil_gradient(optimizer)
    assert parameters[0].grad is None
    assert bool(parameters[1].grad.isnan().all())
    assert math.isnan(take_step(optimizer))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, "name must be one of adamw, .*, muon, got sgd"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"warmup_updates": -1}, "warmup_updates must be at least 0, got -1"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, got step"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        (
            {"name": "adafactor", "adam_beta2": 0.9},
            "adam_beta2 must be left out with optimizer 'adafactor', got 0.9",
        ),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"final_share": 0.0}, r"final_share must be in \(0, 1\], got 0.0"),
        (
            {"schedule": "constant", "final_share": 0.5},
            "final_share must be left out with schedule 'constant', got 0.5",
        ),
        ({"schedule": "cosine"}, "final_share must be below 1 with schedule 'cosine', got 1.0"),
        ({"average_decay": 1.0}, r"average_decay must be in \[0, 1\), got 1.0"),
        ({"skip_limit": -1}, "skip_limit must be at least 0, got -1"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**options)
