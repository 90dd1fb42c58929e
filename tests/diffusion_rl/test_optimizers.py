"""AdamW on the adapter."""

import pytest
import torch

from diffusion_rl.optimizers import OptimizerSettings, build_optimizer


def test_adams_second_memory_is_as_long_as_asked_for() -> None:
    """After a gradient of 1 a long one of 0.01 moves more where the first is forgotten sooner."""
    moved = {}
    for beta2 in (0.5, 0.999):
        weight = torch.nn.Parameter(torch.zeros(1))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"final_share": 0.0}, r"final_share must be in \(0, 1\], got 0.0"),
        ({"average_decay": 1.0}, r"average_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**options)
