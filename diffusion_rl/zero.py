"""ZeRO by DeepSpeed, as the launcher asks for it: each process keeps a part of Adam's state.

Weights and gradients stay whole on every process, and are summed and limited as without it, so that
policies, checkpoints and results are the same; then DeepSpeed moves on each process the weights of
its part and gives them to the others.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from diffusion_rl import processes
from diffusion_rl.optimizers import parameters_of

logger = logging.getLogger(__name__)

OPTIMIZERS = ("adamw",)
"""Those that treat every number alike, and so may be given weights in one row, cut anywhere."""
STAGES = (1, 2)
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wants_zero(launcher: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed, by its variables."""
    return launcher.get("ACCELERATE_USE_DEEPSPEED") == "true"


def check_zero(optimizer: str) -> None:
    """Refuse what does not exist here of a launcher's DeepSpeed configuration.

    Args:
        optimizer: name of the one that learns.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: names the setting and the way out.
    """
    _deepspeed()
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(OPTIMIZERS)} with DeepSpeed, got "
            f"{optimizer}, which needs whole matrices or keeps a state of its own; or launch with "
            "configs/accelerate/ddp_8gpu.yaml"
        )
    asked = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    if asked["stage"] not in STAGES:
        raise ValueError(
            f"zero_stage must be 1 or 2, got {asked['stage']}; configs/accelerate/fsdp2_8gpu.yaml "
            "shares out the weights, too"
        )
    for part in ("offload_optimizer", "offload_param"):
        device = asked.get(part, {}).get("device", "none")
        if device != "none":
            raise ValueError(
                f"{part}_device must be none, got {device}; set full.copies=cpu, which keeps all "
                "policies but the trained one in the computer's memory, or let a lora learn"
            )
    if asked["stage"] == 2:
        logger.info("zero_stage=2 acts as 1 does: gradients are whole until an optimiser step")


class ZeroOptimizer(torch.optim.Optimizer):
    """An optimiser of whole weights whose state lies in parts on the processes.

    `step`, `state_dict` and `load_state_dict` are called by all processes together; gradients are
    the same on all of them then.

    Args:
        optimizer: from `optimizers.build_optimizer`, new; from here on it moves flat parts.

    Raises:
        ValueError: DeepSpeed is set up for another device than the weights are on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        deepspeed = _deepspeed()
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        weights = parameters_of(self)
        own, device = weights[0].device.type, deepspeed.accelerator.get_accelerator().device_name()
        if own != torch.device(device).type:
            raise ValueError(
                f"generator.device must be DeepSpeed's, got {own} and {device}; set "
                f"DS_ACCELERATOR={own} in the environment"
            )
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            # Only so does it take gradients that it has not seen come about.
            "zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": False},
        }
        self._engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(weights),
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        self._parts = optimizer
        logger.info("%d processes hold a part of the optimiser's state each", processes.count())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the weights of this process's part, and get the others'."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, own in zip(self.param_groups, self._parts.param_groups, strict=True):
            own |= {key: value for key, value in group.items() if key != "params"}
        self._engine.allreduce_gradients()  # The mean of what is the same everywhere.
        self._engine.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of an optimiser that is not in parts; others than the first process get no state."""
        found = super().state_dict()
        kept: dict[int, dict[str, Any]] = {}
        passed = [state["step"] for state in self._parts.state.values() if "step" in state]
        for index, weight in enumerate(parameters_of(self)) if passed else ():
            moments = {name: self._moment(weight, name) for name in _MOMENTS}
            if processes.is_main():
                kept[index] = {"step": passed[0].cpu().clone(), **moments}
        return {**found, "state": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's parts of a whole state, and of the weights as they are now."""
        super().load_state_dict({**state_dict, "state": {}})
        tools = importlib.import_module("deepspeed.utils")
        for weight in parameters_of(self):
            tools.safe_set_full_fp32_param(weight, weight.detach())
        if not (kept := state_dict["state"]):
            return
        self._make_room()
        for index, weight in enumerate(parameters_of(self)):
            for name in _MOMENTS if index in kept else ():
                value = kept[index][name].to(weight.device)
                tools.safe_set_full_optimizer_state(weight, value, name)
        passed = max(entries["step"] for entries in kept.values())
        for state in self._parts.state.values():
            state["step"].fill_(passed)

    def _make_room(self) -> None:
        """Have moments to put something into: they come with a first step, which moves nothing."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
        for weight in parameters_of(self):
            weight.grad = torch.zeros_like(weight)
        self.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def _moment(self, weight: Tensor, name: str) -> Tensor:
        """A weight's, whole."""
        whole = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        found: Tensor = whole(weight, name)
        return found.cpu()


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            "distributed_type DEEPSPEED needs deepspeed; install it with: "
            'pip install ".[deepspeed]", or launch with configs/accelerate/fsdp2_8gpu.yaml'
        ) from error
