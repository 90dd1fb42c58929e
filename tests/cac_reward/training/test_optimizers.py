"""Muon and AdamW in one, against torch's two run apart."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from cac_reward.training.optimizers import MATRICES, OTHERS, MuonWithAdamW, split_parameters

RATES = {"muon_rate": 0.02, "adamw_rate": 0.003, "weight_decay": 0.1}


class Net(nn.Module):
    """Matrices, and of everything else something."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 4, bias=False)
        self.patch = nn.Conv2d(1, 2, 2)
        self.lm_head = nn.Linear(4, 3)
        self.cac_heads = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def gradients(net: nn.Module, step: int) -> None:
    """Made up, the same for every copy of a net."""
    dice = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=dice)


def ours(net: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(*split_parameters(net), **RATES)


def apart(net: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = split_parameters(net)
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.98), weight_decay=0.1),
    ]


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def run(net: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: range) -> list[Tensor]:
    for step in steps:
        gradients(net, step)
        for one in optimizers:
            one.step()
    return weights(net)


def test_hidden_matrices_that_learn_are_muons() -> None:
    net = Net()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    matrices, others = ([names[id(one)] for one in part] for part in split_parameters(net))
    assert matrices == ["first.weight", "second.weight"]
    assert sorted(others) == sorted(
        name
        for name in names.values()
        if name not in ("first.weight", "second.weight") and "frozen" not in name
    )


def test_it_is_torchs_two_optimisers() -> None:
    net = Net()
    twin = copy.deepcopy(net)
    start = weights(net)
    found = run(net, [ours(net)], range(5))
    expected = run(twin, apart(twin), range(5))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    moved = [not torch.equal(a, b) for a, b in zip(found, start, strict=True)]
    assert moved == [parameter.requires_grad for parameter in net.parameters()]


def test_it_goes_on_exactly_from_its_state() -> None:
    net = Net()
    optimizer = ours(net)
    run(net, [optimizer], range(3))
    state, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net)
    whole = run(net, [optimizer], range(3, 6))
    again = ours(half)
    again.load_state_dict(state)
    for one, other in zip(run(half, [again], range(3, 6)), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # Without its state it goes elsewhere.
    forgetful = copy.deepcopy(Net())
    forgetful.load_state_dict(half.state_dict())
    assert [group["part"] for group in again.param_groups] == [MATRICES, OTHERS]
    fresh = run(forgetful, [ours(forgetful)], range(6, 7))
    known = run(half, [again], range(6, 7))
    assert any(not torch.equal(a, b) for a, b in zip(fresh, known, strict=True))


def test_schedules_reach_both_parts() -> None:
    net = Net()
    twin = copy.deepcopy(net)
    optimizer, two = ours(net), apart(twin)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 6)
    others = [get_cosine_schedule_with_warmup(one, 2, 6) for one in two]
    for step in range(6):
        run(net, [optimizer], range(step, step + 1))
        run(twin, two, range(step, step + 1))
        for one in (schedule, *others):
            one.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [one.param_groups[0]["lr"] for one in two]
        assert rates[0] == pytest.approx(rates[1] * 0.02 / 0.003)
    for one, other in zip(weights(net), weights(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_closure_gives_the_loss() -> None:
    net = nn.Linear(2, 2)
    optimizer = ours(net)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = net(torch.ones(1, 2)).square().sum()
        value.backward()
        return value

    first, second = optimizer.step(loss), optimizer.step(loss)
    assert second < first


@pytest.mark.parametrize("bias", [False, True])
def test_one_part_may_be_empty(bias: bool) -> None:
    """An adapter has matrices only, the classifier's heads have none."""
    net: nn.Module = nn.Linear(3, 2, bias=False)
    if bias:
        net = nn.LayerNorm(3)
    before = weights(net)
    after = run(net, [ours(net)], range(2))
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
