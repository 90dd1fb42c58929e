"""The part of the generator that learns: a LoRA on its transformer, and the policies it gives.

One transformer holds up to four policies: with the adapter `default` (the one being trained),
with the adapter `old` (a slow copy that draws the videos of forward-process algorithms), with the
adapter `average` (a running average of the trained one, which is what is saved), and with no
adapter at all (the reference the KL term holds on to).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion_rl.generators.families import default_targets
from diffusion_rl.sharding import is_sharded

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

TRAINED, OLD, AVERAGE = "default", "old", "average"
INITS = {"kaiming": True, "gaussian": "gaussian"}
"""PEFT's words for the first values of an adapter."""
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Size and place of the adapter."""

    rank: int = 16
    """Inner width of each update matrix, at least 1."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank; above 0."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that high ranks do not learn less. Files
    hold the alpha that gives this scale by the common rule, which every loader knows."""
    dora: bool = False
    """Learn a magnitude for each output of a layer beside the update of its direction (DoRA)."""
    init: str = "kaiming"
    """First values of the first matrices: kaiming (uniform) or gaussian (of spread 1 / rank). The
    second are zero, so that a fresh adapter changes nothing."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the linear layers adapted; None is all attention and feed-forward
    layers under the family's names."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {self.alpha}")
        if self.init not in INITS:
            raise ValueError(
                f"init must be one of {', '.join(INITS)}, got {self.init}; those that change the "
                "layers' own weights would change the reference too"
            )
        if self.targets is not None and not self.targets:
            raise ValueError("targets must name at least one layer, got none")

    @property
    def common_alpha(self) -> float:
        """The alpha that scales as these settings do, by alpha / rank."""
        return self.alpha * math.sqrt(self.rank) if self.rank_stabilized else self.alpha


def attach_lora(
    transformer: nn.Module,
    settings: LoraSettings,
    *,
    old_policy: bool = False,
    average: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Add the trained adapter, and its slow copies if asked; return the parameters that learn.

    A fresh adapter changes nothing (its second matrix is zero). Adapter weights are float32
    whatever the transformer's type is. Of a ModuleDict every part gets an adapter of its own.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if tuner_layers(transformer):
        raise ValueError("transformer must carry no adapter yet, got one that has; load it afresh")
    parts = list(transformer.values()) if isinstance(transformer, nn.ModuleDict) else [transformer]
    targets = [_targets_of(part, settings) for part in parts]
    copies = [name for name, wanted in ((OLD, old_policy), (AVERAGE, average)) if wanted]
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT warns of a second adapter, which is what is wanted here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        for part, own in zip(parts, targets, strict=True):
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.common_alpha,  # type: ignore[arg-type]  # A float is right too.
                target_modules=own,
                use_dora=settings.dora,
                init_lora_weights=INITS[settings.init],  # type: ignore[arg-type]
            )
            for name in (TRAINED, *copies):
                inject_adapter_in_model(config, part, adapter_name=name)
    for part in parts:
        for name, parameter in part.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(_device_of(part), torch.float32)
            # Shapes alone, by which memory is estimated, have no magnitudes.
            if MAGNITUDE in name and not parameter.is_meta and not bool(parameter.all()):
                raise ValueError(
                    "dora must adapt layers without an output that is always zero, got "
                    f"{name}; leave it out of lora.targets"
                )
    for name in copies:
        follow_trained(transformer, name, decay=0.0)
    _activate(transformer, TRAINED)
    return trained_parameters(transformer)


def _device_of(transformer: nn.Module) -> Any:
    """Where a transformer computes; its own weights may wait elsewhere."""
    own = getattr(transformer, "device", None)
    return next(transformer.parameters()).device if own is None else own


def _targets_of(transformer: nn.Module, settings: LoraSettings) -> list[str]:
    """The settings' targets, or the family's own, each held against the layers there are."""
    targets = settings.targets or default_targets(type(transformer).__name__)
    linears = [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    for target in targets:
        if not any(_ends(name, target) for name in linears):
            raise ValueError(
                f"targets must name linear layers of the transformer, got {target!r}; "
                f"it has {', '.join(linears[:8])}, ..."
            )
    return list(targets)


def tuner_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    """The adapted layers."""
    # Inside the function: settings are read on machines and in tests that never load PEFT.
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in transformer.modules() if isinstance(part, BaseTunerLayer)]


def trained_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The weights the optimiser moves, in the transformer's order."""
    return [
        parameter
        for name, parameter in transformer.named_parameters()
        if f".{TRAINED}." in name and "lora_" in name
    ]


def has_adapter(transformer: nn.Module, adapter: str) -> bool:
    """Whether an adapter of this name is there."""
    return any(f".{adapter}." in name for name, _ in transformer.named_parameters())


def saved_adapter(transformer: nn.Module) -> str:
    """What `save_lora` writes and evaluation measures: the average where there is one."""
    return AVERAGE if has_adapter(transformer, AVERAGE) else TRAINED


def _activate(transformer: nn.Module, adapter: str) -> None:
    """Use this adapter; only the trained one ever carries gradient."""
    for layer in tuner_layers(transformer):
        layer.set_adapter(adapter)
        if adapter != TRAINED:
            for name, parameter in layer.named_parameters():
                if f".{adapter}." in f".{name}":
                    parameter.requires_grad_(False)


@contextmanager
def reference_policy(transformer: nn.Module) -> Iterator[None]:
    """The generator as it was before training: every adapter off."""
    layers = tuner_layers(transformer)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        _activate(transformer, TRAINED)


@contextmanager
def adapter_policy(transformer: nn.Module, adapter: str) -> Iterator[None]:
    """Run with this adapter, for use without gradient."""
    _activate(transformer, adapter)
    try:
        yield
    finally:
        _activate(transformer, TRAINED)


@contextmanager
def old_policy(transformer: nn.Module) -> Iterator[None]:
    """The slow copy of the trained policy, for use without gradient.

    In float32 its update is added to the layers' own weights for the time, which is a third faster
    than an adapter beside them; the weights themselves are put back, not computed back. Weights of
    half precision would round the update away, weights that wait off the device or on other
    processes are not there to be added to, and DoRA does not only add; so then the adapter runs.
    """
    if not has_adapter(transformer, OLD):
        raise RuntimeError("transformer must have an old policy; attach_lora(..., old_policy=True)")
    layers: list[Any] = tuner_layers(transformer)
    weights = [(layer.base_layer.weight, layer.lora_A[OLD].weight) for layer in layers]
    beside = is_sharded(transformer) or any(
        own.dtype != torch.float32 or own.device != lora.device for own, lora in weights
    )
    if beside or any(len(layer.lora_magnitude_vector) for layer in layers):
        with adapter_policy(transformer, OLD):
            yield
        return
    own = [layer.base_layer.weight.data for layer in layers]
    try:
        with torch.no_grad(), reference_policy(transformer):
            for layer, weight in zip(layers, own, strict=True):
                layer.base_layer.weight.data = weight + layer.get_delta_weight(OLD)
            yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.base_layer.weight.data = weight


@torch.no_grad()
def follow_trained(transformer: nn.Module, adapter: str, decay: float) -> None:
    """adapter = decay * adapter + (1 - decay) * trained, in place; decay in [0, 1]."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    parameters = dict(transformer.named_parameters())
    for name, parameter in parameters.items():
        if f".{TRAINED}." in name and "lora_" in name:
            parameters[name.replace(f".{TRAINED}.", f".{adapter}.")].lerp_(parameter, 1 - decay)


def _places(transformer: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's weights by the names diffusers gives them (no adapter, no PEFT prefix)."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if f".{adapter}." in name and "lora_" in name
    }


def lora_state(transformer: nn.Module, adapter: str = TRAINED) -> dict[str, Tensor]:
    """Copies of an adapter's weights on the CPU, named as diffusers names them."""
    places = _places(transformer, adapter)
    return {name: place.detach().cpu().clone().contiguous() for name, place in places.items()}


@torch.no_grad()
def set_lora_state(
    transformer: nn.Module, state: dict[str, Tensor], adapter: str = TRAINED, source: str = "LoRA"
) -> None:
    """Put weights from `lora_state` into an adapter; a LoRA of another model is refused."""
    places = _places(transformer, adapter)
    check_same_model(adapter_shapes(transformer, adapter), state, source)
    for name, place in places.items():
        place.copy_(state[name])


def check_same_model(
    shapes: dict[str, torch.Size],
    state: dict[str, Tensor],
    source: str,
    settings: str = "lora settings",
) -> None:
    """One clear error instead of a list of missing keys."""
    problem = None
    for name in sorted(set(state) | set(shapes)):
        if name not in shapes:
            problem = f"{name!r} has no place in it"
        elif name not in state:
            problem = f"{name!r} is missing"
        elif state[name].shape != shapes[name]:
            problem = f"{name!r} is {tuple(state[name].shape)}, not {tuple(shapes[name])}"
        if problem:
            raise ValueError(
                f"{source} must fit the generator's transformer, got {len(state)} weights for "
                f"{len(shapes)} places ({problem}); it belongs to another model or to other "
                f"{settings}"
            )


def adapter_shapes(transformer: nn.Module, adapter: str = TRAINED) -> dict[str, torch.Size]:
    """Shapes of an adapter's weights."""
    return {name: place.shape for name, place in _places(transformer, adapter).items()}


def shapes_to_attach(transformer: nn.Module, settings: LoraSettings) -> dict[str, torch.Size]:
    """Shapes of the weights that `attach_lora` would add."""
    shapes, targets = {}, settings.targets or default_targets(type(transformer).__name__)
    for name, part in transformer.named_modules():
        if isinstance(part, nn.Linear) and any(_ends(name, end) for end in targets):
            shapes[f"{name}.lora_A.weight"] = torch.Size((settings.rank, part.in_features))
            shapes[f"{name}.lora_B.weight"] = torch.Size((part.out_features, settings.rank))
            if settings.dora:
                shapes[f"{name}.{MAGNITUDE}.weight"] = torch.Size((part.out_features,))
    return shapes


def _ends(name: str, target: str) -> bool:
    """Whether a target names this layer, by PEFT's rule."""
    return name == target or name.endswith("." + target)
