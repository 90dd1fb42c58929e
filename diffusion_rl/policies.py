"""What learns, and the policies that one transformer holds while it does: the loop's one way to
them, whether a LoRA learns or the transformer's own weights (`full_policies.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from diffusion_rl import lora
from diffusion_rl.full_policies import REFERENCE, AbstractPolicies, FullPolicies, FullSettings
from diffusion_rl.lora import AVERAGE, OLD, TRAINED, LoraSettings
from diffusion_rl.sharded_policies import ShardedPolicies
from diffusion_rl.sharding import is_sharded

# Where the full policies of a transformer are kept, as PEFT keeps an adapter's settings.
_ATTRIBUTE = "full_policies"


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

    def state(self, policy: str = TRAINED, *, everywhere: bool = True) -> dict[str, Tensor]:
        return lora.lora_state(self.transformer, policy)

    def set_state(self, state: Mapping[str, Tensor], policy: str, source: str) -> None:
        lora.set_lora_state(self.transformer, dict(state), policy, source)


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
    kind = ShardedPolicies if is_sharded(transformer) else FullPolicies
    policies = kind(transformer, settings, copies, learns=learns)
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
