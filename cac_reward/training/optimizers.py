"""Muon for matrices and AdamW for all else, as one optimiser that trainers can save and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MATRICES, OTHERS = "matrices", "others"


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on hidden matrices and AdamW on the rest, with one state.

    Args:
        matrices: two-dimensional weights.
        others: everything else that learns: embeddings, norms, biases.
        muon_rate: learning rate of the matrices, matched to AdamW's by their shape.
        adamw_rate: learning rate of the others.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        muon_rate: float,
        adamw_rate: float,
        weight_decay: float,
    ) -> None:
        self._parts: dict[str, torch.optim.Optimizer] = {}
        # torch's optimisers refuse to have nothing to move; adapters have matrices only.
        if matrices := list(matrices):
            self._parts[MATRICES] = torch.optim.Muon(
                matrices,
                lr=muon_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        if others := list(others):
            self._parts[OTHERS] = torch.optim.AdamW(
                others, lr=adamw_rate, betas=(0.9, 0.98), weight_decay=weight_decay
            )
        groups = [{**part.param_groups[0], "part": name} for name, part in self._parts.items()]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; what was loaded or rescheduled since is what they use."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            part = self._parts[group["part"]]
            part.param_groups = [group]
            part.state = self.state
            part.step()
        return loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices that learn, and everything else that does.

    Embeddings, outputs and the heads' last layers are no hidden matrices, whatever their shape.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        outer = any(part in name for part in ("embed", "lm_head", "cac_heads"))
        (others if outer or parameter.ndim != 2 else matrices).append(parameter)
    return matrices, others
