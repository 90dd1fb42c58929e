"""Policies whose weights are the transformer's own: what full fine-tuning moves.

Up to four policies: the one being trained; `old`, a slow copy that draws the videos of
forward-process algorithms; `average`, a running average of the trained one, which is what is
saved; and the reference, the generator as it was, which the KL term holds on to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion_rl.lora import TRAINED, check_same_model

REFERENCE = "reference"
COPIES = ("device", "cpu")
LEARNABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """Full fine-tuning: the transformer's own weights learn instead of a LoRA."""

    targets: tuple[str, ...] | None = None
    """Ends of the names of the weights, or of the layers all of whose weights, learn; None is
    every weight."""
    copies: str = "device"
    """Where the reference policy and the slow copies are kept: on the transformer's device, or on
    the cpu, from where they are brought each time they are used."""

    def __post_init__(self) -> None:
        if self.targets is not None and not self.targets:
            raise ValueError("targets must name at least one weight or layer, got none")
        if self.copies not in COPIES:
            raise ValueError(f"copies must be one of {', '.join(COPIES)}, got {self.copies}")


class AbstractPolicies(ABC):
    """The policies of one transformer; outside `use` the trained one is active."""

    split: frozenset[nn.Parameter] = frozenset()
    """Of `parameters`, those of which every process moves its own part."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves, in the transformer's order."""

    @abstractmethod
    def sync(self) -> None:
        """Let the transformer run with what the optimiser has moved."""

    @abstractmethod
    def has(self, policy: str) -> bool:
        """Whether there is such a copy; the reference and the trained policy always are."""

    @abstractmethod
    def use(self, policy: str) -> AbstractContextManager[None]:
        """Run with another policy for a time, without gradient."""

    @abstractmethod
    def follow(self, policy: str, decay: float) -> None:
        """policy = decay * policy + (1 - decay) * trained, in place; decay in [0, 1]."""

    @abstractmethod
    def state(self, policy: str = TRAINED, *, everywhere: bool = True) -> dict[str, Tensor]:
        """Copies of a policy's learnt weights on the CPU, in full precision.

        Args:
            policy: one that there is.
            everywhere: False where only the first process needs them; where weights are split,
                the others then get none, and hold no copy.
        """

    @abstractmethod
    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        """Put weights from `state` back; those of another model are refused, nothing touched."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State of what moves `parameters`, of whole weights; for the first process."""
        return optimizer.state_dict()

    def own_optimizer_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """This process's part of an `optimizer_state`."""
        return dict(state)


class FullPolicies(AbstractPolicies):
    """Policies that are whole sets of weights, swapped in when they are used.

    Weights of half precision learn through float32 masters: the optimiser moves those, gradients
    are summed in them, and the transformer runs with their rounding. Slow copies are float32 too;
    the reference is kept in the transformer's own type, to the bit.

    Args:
        transformer: carries no adapter.
        settings: which weights learn, where copies are kept.
        copies: of `old` and `average`, those to keep.
        learns: False for weights that are loaded only to be used, which need no masters.
    """

    def __init__(
        self,
        transformer: nn.Module,
        settings: FullSettings,
        copies: Sequence[str] = (),
        *,
        learns: bool = True,
    ) -> None:
        self.transformer = transformer
        self.places = _places_of(transformer, settings)
        self.parts = {name: self._own_part(place) for name, place in self.places.items()}
        self.on_cpu = settings.copies == "cpu"
        self.trained = {
            name: nn.Parameter(part.detach().float())
            if learns and part.dtype.itemsize < 4
            else part
            for name, part in self.parts.items()
        }
        own_type = {name: self._keep(part) for name, part in self.parts.items()}
        self.copies: dict[str, dict[str, Tensor]] = {REFERENCE: own_type}
        for policy in copies:
            masters = self.trained.items()
            self.copies[policy] = {name: self._keep(master) for name, master in masters}
        for name, place in self.places.items():
            place.requires_grad_(learns)
            if self.trained[name] is not place:
                place.register_post_accumulate_grad_hook(partial(_hand_over, self.trained[name]))

    def _own_part(self, place: nn.Parameter) -> nn.Parameter:
        """What of a weight lies on this process, in the same memory."""
        return place

    def _keep(self, value: Tensor) -> Tensor:
        return value.detach().to("cpu" if self.on_cpu else value.device, copy=True)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    @torch.no_grad()
    def sync(self) -> None:
        for name, part in self.parts.items():
            if self.trained[name] is not part:
                part.copy_(self.trained[name])

    def has(self, policy: str) -> bool:
        return policy == TRAINED or policy in self.copies

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        own = {name: place.data for name, place in self.places.items()}
        kept = own if policy == TRAINED else self.copies[policy]
        try:
            for name, place in self.places.items():
                place.data = kept[name].to(place.device, place.dtype)
            with torch.no_grad():
                yield
        finally:
            for name, place in self.places.items():
                place.data = own[name]

    @torch.no_grad()
    def follow(self, policy: str, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        for name, value in self.copies[policy].items():
            value.lerp_(self.trained[name].to(value.device), 1 - decay)

    def state(self, policy: str = TRAINED, *, everywhere: bool = True) -> dict[str, Tensor]:
        values = self.trained if policy == TRAINED else self.copies[policy]
        return {
            name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()
        }

    @torch.no_grad()
    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        values = self.trained if policy == TRAINED else self.copies[policy]
        shapes = {name: place.shape for name, place in self.places.items()}
        check_same_model(shapes, dict(state), source, "full.targets")
        for name, value in values.items():
            value.copy_(own_part(state[name], self.places[name]))
        self.sync()


def _places_of(transformer: nn.Module, settings: FullSettings) -> dict[str, nn.Parameter]:
    """The weights that learn by name; every target must name some."""
    places = dict(transformer.named_parameters())
    if settings.targets is not None:
        wanted: set[str] = set()
        for target in settings.targets:
            found = {name for name in places if _within(name, target)}
            if not found:
                raise ValueError(
                    f"targets must name weights or layers of the transformer, got {target!r}; it "
                    f"has {', '.join(list(places)[:8])}, ..."
                )
            wanted |= found
        places = {name: place for name, place in places.items() if name in wanted}
    for name, place in places.items():
        if place.dtype not in LEARNABLE:
            raise ValueError(
                f"full must let float32, bfloat16 or float16 weights learn, got {name} of "
                f"{place.dtype}; leave it out of full.targets, or train a lora"
            )
    return places


def own_part(whole: Tensor, place: nn.Parameter) -> Tensor:
    """What of a whole weight lies where `place` does on this process; nothing is sent."""
    if not isinstance(place, DTensor):
        return whole
    spread = (place.device_mesh, place.placements)
    return distribute_tensor(whole.to(place.device), *spread, src_data_rank=None).to_local()


def _within(name: str, target: str) -> bool:
    """Whether a weight, or a layer that it is in, has a name that ends as the target does."""
    return f".{target}." in f".{name}."


def _hand_over(master: nn.Parameter, place: Tensor) -> None:
    """Add a weight's gradient, or this process's part of it, to its master's, and free it."""
    gradient, place.grad = place.grad, None
    assert gradient is not None
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    if master.grad is None:
        master.grad = gradient.to(master)
    else:
        master.grad.add_(gradient)
