"""Vision attention for all pictures of a size at once gives what transformers' own gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cac_reward.judges.families import FAMILIES
from cac_reward.training.pictures import ATTENTIONS, attend_together
from tests.tiny_judge import build_tiny_judge

# In patches; sizes in turn, one of them once.
GRID = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 4, 6], [1, 8, 4], [1, 2, 2], [1, 6, 4]])


def model_of(folder: Path, attention: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)


def look(model: Any, patches: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the vision tower makes of the pictures, and the gradients of a loss on it."""
    output = model.model.visual(patches, grid_thw=GRID)
    out = output.pooler_output
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    model.zero_grad()
    loss.backward()
    grads = {
        name: one.grad
        for name, one in model.model.visual.named_parameters()
        if one.grad is not None
    }
    return out.detach(), grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_numbers_and_gradients_are_the_stock_ones(
    family: str, attention: str, tmp_path: Path
) -> None:
    build_tiny_judge(tmp_path, patch_size=4, merge_size=2, vision_layers=2, family=family)
    model = model_of(tmp_path, attention)
    patches = torch.randn(int(GRID.prod(1).sum()), 3 * 2 * 4 * 4)
    expected, expected_grads = look(model, patches)
    layers = attend_together(model)
    assert layers == len(model.model.visual.blocks) == 2
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    found, grads = look(model, patches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # Sums in another order.
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4)  # As above.
    assert found.abs().max() > 1e-3

    def counted(*arguments: Any, **more: Any) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return attend(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        look(model, patches)
    if family != "qwen2_5_vl":  # Which attends within windows in all but some layers.
        # 24, 4 and 32 patches: three sizes of picture in each layer.
        assert len(calls) == 3 * layers
        assert sorted(shape[0] for shape in calls[:3]) == [1, 2, 3]


def test_pictures_do_not_see_each_other(tmp_path: Path) -> None:
    build_tiny_judge(tmp_path, patch_size=4, merge_size=2)
    model = model_of(tmp_path, "sdpa")
    attend_together(model)
    patches = torch.randn(int(GRID.prod(1).sum()), 3 * 2 * 4 * 4)
    before, _ = look(model, patches)
    patches[:24] += 1.0
    after, _ = look(model, patches)
    assert not torch.equal(before[:6], after[:6])
    torch.testing.assert_close(before[6:], after[6:], rtol=0, atol=0)


def test_every_family_has_its_attention() -> None:
    homes = {module.__name__.split(".")[-2] for module in ATTENTIONS.values()}
    assert homes == set(FAMILIES)


def test_other_models_are_left_alone() -> None:
    assert attend_together(torch.nn.Linear(2, 2)) == 0
