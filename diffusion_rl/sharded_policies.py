"""Full fine-tuning where every process holds, moves and copies its own part of each weight (FSDP2).

Parts are plain tensors, so that any optimiser that treats every number alike can move them; whole
weights come together one at a time, to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion_rl import processes
from diffusion_rl.full_policies import FullPolicies, own_part
from diffusion_rl.lora import TRAINED
from diffusion_rl.sharding import forget_gathered

OPTIMIZERS = ("adamw",)
"""Those that a part of a weight is enough for, and whose state can be put together again."""


class ShardedPolicies(FullPolicies):
    """As `FullPolicies`, of a transformer that `sharding.shard` shared out.

    `use`, `state`, `set_state` and `optimizer_state` are called by all processes together.
    """

    _in_use = False

    @cached_property
    def split(self) -> frozenset[nn.Parameter]:  # type: ignore[override]
        return frozenset(
            self.trained[name] for name, place in self.places.items() if isinstance(place, DTensor)
        )

    def _own_part(self, place: nn.Parameter) -> nn.Parameter:
        if not isinstance(place, DTensor):
            return place
        return nn.Parameter(place.to_local().detach())

    @torch.no_grad()
    def sync(self) -> None:
        super().sync()
        forget_gathered(self.transformer)

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        assert not self._in_use, "one policy at a time"
        own = {name: part.detach().clone() for name, part in self.parts.items()}
        kept = own if policy == TRAINED else self.copies[policy]
        self._in_use = True
        try:
            self._show(kept)
            with torch.no_grad():
                yield
        finally:
            self._show(own)
            self._in_use = False

    @torch.no_grad()
    def _show(self, values: Mapping[str, Tensor]) -> None:
        """Let the transformer run with other weights; it gathers what lies in its parts."""
        for name, part in self.parts.items():
            part.copy_(values[name])
        forget_gathered(self.transformer)

    def state(self, policy: str = TRAINED, *, everywhere: bool = True) -> dict[str, Tensor]:
        values = self.trained if policy == TRAINED else self.copies[policy]
        kept = everywhere or processes.is_main()
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            whole = _whole(value.detach(), self.places[name])
            if kept:
                found[name] = whole.to("cpu", copy=True).contiguous()
        return found

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        found = optimizer.state_dict()
        moments: dict[int, dict[str, Any]] = {}
        for index, (name, part) in enumerate(self.trained.items()):
            for key, value in found["state"].get(index, {}).items():
                like_weight = isinstance(value, Tensor) and value.shape == part.shape
                whole = _whole(value, self.places[name]) if like_weight else value
                if processes.is_main():
                    kept = whole.cpu() if like_weight else whole
                    moments.setdefault(index, {})[key] = kept
        return {**found, "state": moments}

    def own_optimizer_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        places = list(self.places.values())
        moments = {
            index: {
                key: own_part(value, places[index])
                if isinstance(value, Tensor) and value.shape == places[index].shape
                else value
                for key, value in entries.items()
            }
            for index, entries in state["state"].items()
        }
        return {**state, "state": moments}


def _whole(part: Tensor, place: nn.Parameter) -> Tensor:
    """A weight, or what is shaped like it, of the parts of all processes."""
    if not isinstance(place, DTensor):
        return part
    shared = DTensor.from_local(
        part.to(place.device),
        place.device_mesh,
        place.placements,
        run_check=False,
        shape=place.shape,
        stride=place.stride(),
    )
    return shared.full_tensor()
