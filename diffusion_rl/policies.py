"""What learns, and the policies that one transformer holds while it does: the loop's one way to
them, whether a LoRA learns or the transformer's own weights.

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

import torch
from torch import Tensor, nn

from diffusion_rl import lora
from diffusion_rl.lora import AVERAGE, OLD, TRAINED, LoraSettings, check_same_model

REFERENCE = "reference"
COPIES = ("device", "cpu")
LEARNABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where the full policies of a transformer are kept, as PEFT keeps an adapter's settings.
_ATTRIBUTE = "full_policies"


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
    def state(self, policy: str = TRAINED) -> dict[str, Tensor]:
        """Copies of a policy's learnt weights on the CPU, in full precision."""

    @abstractmethod
    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        """Put weights from `state` back; those of another model are refused, nothing touched."""


class AdapterPolicies(AbstractPolicies):
    """Policies that are adapters; the reference is the transformer without any."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def parameters(self) -> list[nn.Parameter]:
        return lora.trained_parameters(self.transformer)

    def sync(self) -> None:
        """Nothing to do: the optimiser moves the very weights that run."""

    def has(self, policy: str) -> bool:
        return policy == REFERENCE or lora.has_adapter(self.transformer, policy)

    def use(self, policy: str) -> AbstractContextManager[None]:
        if policy == REFERENCE:
            return lora.reference_policy(self.transformer)
        if policy == OLD:
            return lora.old_policy(self.transformer)
        return lora.adapter_policy(self.transformer, policy)

    def follow(self, policy: str, decay: float) -> None:
        lora.follow_trained(self.transformer, policy, decay)

    def state(self, policy: str = TRAINED) -> dict[str, Tensor]:
        return lora.lora_state(self.transformer, policy)

    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        lora.set_lora_state(self.transformer, dict(state), policy, source)


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
        self.places = _places_of(transformer, settings)
        self.on_cpu = settings.copies == "cpu"
        self.trained = {
            name: nn.Parameter(place.detach().float())
            if learns and place.dtype.itemsize < 4
            else place
            for name, place in self.places.items()
        }
        own_type = {name: self._keep(place) for name, place in self.places.items()}
        self.copies: dict[str, dict[str, Tensor]] = {REFERENCE: own_type}
        for policy in copies:
            masters = self.trained.items()
            self.copies[policy] = {name: self._keep(master) for name, master in masters}
        for name, place in self.places.items():
            place.requires_grad_(learns)
            if self.trained[name] is not place:
                place.register_post_accumulate_grad_hook(partial(_hand_over, self.trained[name]))

    def _keep(self, value: Tensor) -> Tensor:
        return value.detach().to("cpu" if self.on_cpu else value.device, copy=True)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    @torch.no_grad()
    def sync(self) -> None:
        for name, place in self.places.items():
            if self.trained[name] is not place:
                place.copy_(self.trained[name])

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

    def state(self, policy: str = TRAINED) -> dict[str, Tensor]:
        values = self.trained if policy == TRAINED else self.copies[policy]
        return {
            name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()
        }

    @torch.no_grad()
    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        values = self.trained if policy == TRAINED else self.copies[policy]
        shapes = {name: value.shape for name, value in values.items()}
        check_same_model(shapes, dict(state), source, "full.targets")
        for name, value in values.items():
            value.copy_(state[name])
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


def _within(name: str, target: str) -> bool:
    """Whether a weight, or a layer that it is in, has a name that ends as the target does."""
    return f".{target}." in f".{name}."


def _hand_over(master: nn.Parameter, place: Tensor) -> None:
    """Add a half-precision gradient to the master's, and free it."""
    gradient, place.grad = place.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master)
    else:
        master.grad.add_(gradient)


def attach_policies(
    transformer: nn.Module,
    settings: LoraSettings | FullSettings,
    *,
    old_policy: bool = False,
    average: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Let a fresh LoRA learn, or the weights themselves; return what the optimiser moves.

    Args:
        transformer: freshly loaded; a ModuleDict where two transformers learn.
        settings: of one or the other.
        old_policy: whether the algorithm keeps a slow copy that draws the videos.
        average: whether a running average is kept, to be saved instead of the last weights.
        seed: of a LoRA's first weights.
    """
    if isinstance(settings, LoraSettings):
        check_untouched(transformer)
        return lora.attach_lora(
            transformer, settings, old_policy=old_policy, average=average, seed=seed
        )
    copies = [name for name, wanted in ((OLD, old_policy), (AVERAGE, average)) if wanted]
    return attach_full(transformer, settings, copies).parameters()


def attach_full(
    transformer: nn.Module,
    settings: FullSettings,
    copies: Sequence[str] = (),
    *,
    learns: bool = True,
) -> FullPolicies:
    """Keep full policies with a transformer that has no LoRA; arguments as `FullPolicies`."""
    check_untouched(transformer)
    policies = FullPolicies(transformer, settings, copies, learns=learns)
    setattr(transformer, _ATTRIBUTE, policies)
    return policies


def check_untouched(transformer: nn.Module) -> None:
    """Refuse a transformer that something was attached to before."""
    if full_policies(transformer) is not None or lora.tuner_layers(transformer):
        raise ValueError(
            "transformer must carry no adapter and no learnt weights yet, got one that does; load "
            "it afresh"
        )


def full_policies(transformer: nn.Module) -> FullPolicies | None:
    """Those of a transformer whose own weights learn, or were loaded; else None."""
    return getattr(transformer, _ATTRIBUTE, None)


def policies_of(transformer: nn.Module) -> AbstractPolicies:
    """The policies that a transformer holds."""
    return full_policies(transformer) or AdapterPolicies(transformer)


def trained_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """What the optimiser moves, in the transformer's order; none before something is attached."""
    return policies_of(transformer).parameters()


def reference_policy(transformer: nn.Module) -> AbstractContextManager[None]:
    """The generator as it was before training."""
    return policies_of(transformer).use(REFERENCE)


def old_policy(transformer: nn.Module) -> AbstractContextManager[None]:
    """The slow copy of the trained policy, for use without gradient."""
    policies = policies_of(transformer)
    if not policies.has(OLD):
        raise RuntimeError(
            "transformer must have an old policy; attach_policies(..., old_policy=True)"
        )
    return policies.use(OLD)


def saved_policy(transformer: nn.Module) -> AbstractContextManager[None]:
    """The policy that is saved, for use without gradient: the average where there is one."""
    policies = policies_of(transformer)
    return policies.use(AVERAGE if policies.has(AVERAGE) else TRAINED)


def update_old_policy(transformer: nn.Module, decay: float) -> None:
    """old = decay * old + (1 - decay) * trained, in place; decay in [0, 1]."""
    policies_of(transformer).follow(OLD, decay)


def update_average(transformer: nn.Module, decay: float, update: int) -> None:
    """average = d * average + (1 - d) * trained, in place, where one is kept.

    d = min(decay, (update - 1) / (update + 8)), so that the first updates are not held back by a
    beginning that changes nothing.

    Args:
        transformer: carries the policies.
        decay: in [0, 1).
        update: number of the update just made, from 1.
    """
    policies = policies_of(transformer)
    if policies.has(AVERAGE):
        policies.follow(AVERAGE, min(decay, (update - 1) / (update + 8)))
