"""Weights shared out over the processes: FSDP2 as the launcher asks for it.

The transformer's weights lie in parts on the processes and come together a block at a time. A LoRA
is small and whole everywhere, so that its gradients are added up, and it is averaged and saved, as
where nothing is shared out; where the weights themselves learn, each process moves its own parts
(`sharded_policies.py`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from diffusion_rl import processes

logger = logging.getLogger(__name__)


def wants_shards(launcher: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was told to shard, by its variables.

    Raises:
        ValueError: it was told to do so in a way that does not exist here.
    """
    if launcher.get("ACCELERATE_USE_FSDP") != "true":
        return False
    if launcher.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"fsdp_version must be 2, got {launcher.get('FSDP_VERSION')}; "
            "configs/accelerate/fsdp2_8gpu.yaml has it"
        )
    return True


def check_precision(dtype: str, launcher: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher's mixed_precision that is not the generator's type: nothing heeds it.

    Args:
        dtype: of the generator.
        launcher: its variables.
    """
    asked = launcher.get("ACCELERATE_MIXED_PRECISION", "no")
    name = {"bf16": "bfloat16", "fp16": "float16"}.get(asked, asked)
    if name not in ("no", dtype):
        raise ValueError(
            f"mixed_precision must be 'no' or that of generator.dtype, got {asked} and {dtype}; "
            f"launch with --mixed_precision no, or set generator.dtype={name}"
        )


def shard(
    transformer: nn.Module,
    learning: Sequence[nn.Parameter] = (),
    launcher: Mapping[str, str] = os.environ,
) -> None:
    """Share out the weights of a transformer, but for a LoRA's, block by block, in place.

    Weights of another type than most (norms and tables that a half-precision model keeps in
    float32) are small and stay whole.

    Args:
        transformer: with its LoRA attached, if there is to be one; a ModuleDict where two learn.
        learning: a LoRA's, which stay whole on every process; none for full fine-tuning.
        launcher: its variables: FSDP_RESHARD_AFTER_FORWARD, FSDP_OFFLOAD_PARAMS and
            FSDP_TRANSFORMER_CLS_TO_WRAP, names of the blocks; else the model's own are taken.

    Raises:
        ValueError: there are no blocks of these names.
    """
    parts = list(transformer.values()) if isinstance(transformer, nn.ModuleDict) else [transformer]
    wanted = launcher.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    device = next(transformer.parameters()).device.type
    mesh = init_device_mesh(device, (processes.count(),))
    reshard = launcher.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    offloads = launcher.get("FSDP_OFFLOAD_PARAMS") == "true"
    kept = set(learning)
    for part in parts:
        names = wanted.split(",") if wanted else list(getattr(part, "_repeated_blocks", None) or [])
        blocks = [one for one in part.modules() if type(one).__name__ in names]
        if not blocks:
            raise ValueError(
                "fsdp_transformer_layer_cls_to_wrap must name blocks of the transformer, got "
                f"{names or 'none'}, and {type(part).__name__} has none of them"
            )
        sizes = Counter[torch.dtype]()
        for parameter in part.parameters():
            sizes[parameter.dtype] += 0 if parameter in kept else parameter.numel()
        usual = sizes.most_common(1)[0][0]
        whole = {
            parameter
            for name, parameter in part.named_parameters()
            if parameter in kept or "lora_" in name or parameter.dtype != usual
        }
        for module in (*blocks, part):
            sharded = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=reshard,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy(),
                ignored_params=whole,
            )
            # Gradients are summed, as those of whole weights are; each loss has its share already.
            sharded.set_force_sum_reduction_for_comms(True)
            sharded.set_gradient_divide_factor(1.0)
    logger.info("%d processes hold a part of the weights each", processes.count())


def forget_gathered(transformer: nn.Module) -> None:
    """Let go of whole weights that were kept after a pass, since their parts have changed."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(model: nn.Module) -> nn.Module | None:
    """A diffusers model with whole weights on the CPU, for the first process; None for the others.

    All processes call it; a model that is not shared out is given back as it is.
    """
    if not is_sharded(model):
        return model
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if processes.is_main():
            state[name] = whole.cpu()
    if not processes.is_main():
        return None
    kind: Any = type(model)
    with torch.device("meta"):
        found: nn.Module = kind.from_config(model.config)
    found.load_state_dict(state, assign=True)
    return found


def is_sharded(transformer: nn.Module) -> bool:
    """Whether processes must pass through it together."""
    return any(isinstance(one, FSDPModule) for one in transformer.modules())


def device_of_passes(transformer: nn.Module) -> torch.device | None:
    """Where the weights of a sharded transformer come together; None where it is whole.

    In between their parts may wait on the CPU (fsdp_offload_params).
    """
    if processes.count() == 1:
        return None
    for parameter in transformer.parameters():
        if isinstance(parameter, DTensor):
            kind = parameter.device_mesh.device_type
            if kind == "cuda":
                return torch.device(kind, torch.cuda.current_device())
            return torch.device(kind)
    return None


def rows_in_step(transformer: nn.Module, chosen: Sequence[Tensor]) -> list[Tensor]:
    """Rows of a batch that this process passes through each of several transformers; maybe none.

    Sharded weights come together, forwards and backwards, when all processes ask for the same. So
    a process without rows for a transformer that others pass through passes its first; where
    nothing of that is kept, its gradient is zero.

    Args:
        transformer: sharded or not, as all of them are.
        chosen: [B] bool for each of them, its own rows.
    """
    rows = [one.nonzero().flatten() for one in chosen]
    if processes.count() == 1 or not is_sharded(transformer):
        return rows
    most = processes.largest([float(len(one)) for one in rows])
    first = torch.zeros(1, dtype=torch.long, device=rows[0].device)
    return [first if count and not len(own) else own for own, count in zip(rows, most, strict=True)]


def in_step(
    transformer: nn.Module, parts: Sequence[slice], spare: slice | None = None
) -> list[slice]:
    """Parts of a batch, the first repeated until every process makes as many passes.

    Only where the weights are sharded, and come together when all processes pass.

    Args:
        transformer: sharded or not.
        parts: of this process.
        spare: what it passes instead where it has no part and another process has some.

    Raises:
        RuntimeError: this or another process has nothing to pass; all of them say so.
    """
    if not is_sharded(transformer):
        return list(parts)
    counts = processes.gather_objects(len(parts))
    spares = processes.gather_objects(spare is not None)
    idle = [not count and not has for count, has in zip(counts, spares, strict=True)]
    if any(idle) and max(counts):
        raise RuntimeError(
            "reward must judge at least one video of each process where weights are sharded, got "
            f"passes {counts} of the processes; raise rollout.videos_per_prompt, or launch "
            "without FSDP"
        )
    again = parts[0] if parts else spare
    return [*parts, *([again] if again else []) * (max(counts) - len(parts))]
