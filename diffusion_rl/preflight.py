"""What is asked of a run's settings before anything is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from diffusion_rl import processes, sharded_policies
from diffusion_rl.configuration import RunSettings
from diffusion_rl.prompts import read_prompts
from diffusion_rl.row_kinds import OldPolicySettings
from diffusion_rl.sharding import check_precision, wants_shards
from diffusion_rl.tracking import check_trackers
from diffusion_rl.zero import check_zero, wants_zero

logger = logging.getLogger(__name__)


def check_run(settings: RunSettings) -> None:
    """Refuse what could not run here, and warn of what is likely to come apart.

    Raises:
        ValueError: names the setting and the way out.
        ImportError: a tracker is not installed.
    """
    if settings.generator.dtype == "float16":
        raise ValueError(
            "generator.dtype must be bfloat16 or float32 to train, got float16, in which the "
            "gradient of a mean over a video's numbers rounds to 0; drawing videos takes it"
        )
    check_processes(settings)
    check_held_out(settings)
    check_trackers(settings.trackers)
    if not settings.guards:
        logger.warning(
            "guards is empty: nothing keeps the policy from still, blurred or grey videos, and the "
            "alarm for hacking watches evaluation rewards alone"
        )
    inexact = isinstance(settings.algorithm, OldPolicySettings)
    if inexact and settings.credit.focus and not settings.credit.balanced:
        logger.warning(
            "credit.balanced is off: with %s focused disadvantages push a prompt's videos away "
            "where faults are often blamed, until the policy falls apart; set credit.balanced=true "
            "(docs/algorithms.md)",
            settings.algorithm.name,
        )


def check_processes(settings: RunSettings) -> None:
    """Refuse settings that would not do in the processes of this run what they say.

    Raises:
        ValueError: names the setting and the way out.
    """
    check_precision(settings.generator.dtype)
    check_accumulation()
    warn_of_one_process()
    if processes.count() > 1 and wants_zero():
        check_zero(settings.optimizer.name)
    execution = settings.generator.execution
    if execution.context_parallel is not None and (wants_shards() or wants_zero()):
        raise ValueError(
            "generator.execution.context_parallel must be left out where the launcher shards "
            "weights (FSDP) or DeepSpeed runs, got both, which never ran together; launch with "
            "configs/accelerate/ddp_8gpu.yaml"
        )
    shards = processes.count() > 1 and wants_shards()
    if settings.samples is not None and (shards or execution.context_parallel is not None):
        where = "where the launcher shards weights (FSDP)"
        raise ValueError(
            "samples must be left out "
            f"{where if shards else 'with generator.execution.context_parallel'}, got it; one "
            "process alone cannot draw: sample from the LoRA of a checkpoint instead"
        )
    if not shards:
        return
    if settings.full is not None:
        check_split(settings)
    if execution.offload is not None and "transformer" in execution.offload.parts:
        raise ValueError(
            "execution.offload.parts must be without the transformer where the launcher shards it "
            "(FSDP), got both; fsdp_offload_params of the launcher's config does that"
        )


def check_accumulation(launcher: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher's gradient_accumulation_steps above 1: nothing heeds it.

    Raises:
        ValueError: names the setting and the way out.
    """
    asked = launcher.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if asked not in ("auto", "1"):
        raise ValueError(
            f"gradient_accumulation_steps of the launcher must be auto or 1, got {asked}; an "
            "optimiser step learns from all its videos anyway, rollout.update_micro_batch at a time"
        )


def warn_of_one_process(launcher: Mapping[str, str] = os.environ) -> None:
    """Say what of a launcher's settings does nothing where one process runs alone."""
    names = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
    asked = [name for key, name in names.items() if launcher.get(key) == "true"]
    if processes.count() > 1 or not asked:
        return
    offloads = asked == ["FSDP"] and launcher.get("FSDP_OFFLOAD_PARAMS") == "true"
    logger.warning(
        "distributed_type: %s of the launcher%s does nothing with num_processes: 1: this process "
        "holds all weights and their state; start several, or save memory with "
        "generator.execution.offload (docs/finetuning.md)",
        asked[0],
        ", fsdp_offload_params among it," if offloads else "",
    )


def check_held_out(settings: RunSettings) -> None:
    """Refuse fewer held-out videos than there are processes to share them out over.

    Raises:
        ValueError: names the settings and the way out.
        FileNotFoundError: there is no such file of prompts.
    """
    own, tokens = settings.evaluation, settings.generator.execution.context_parallel
    if own is None or own.prompts is None:
        return
    prompts = len(read_prompts(own.prompts, settings.prompt_column))
    teams = processes.count() // (1 if tokens is None else tokens.size)
    if prompts * own.videos_per_prompt < teams:
        raise ValueError(
            "evaluation.prompts times evaluation.videos_per_prompt must be at least the "
            f"{teams} processes (or teams of them), got {prompts} x {own.videos_per_prompt} "
            "videos; raise evaluation.videos_per_prompt, add prompts, or start fewer processes"
        )


def check_split(settings: RunSettings) -> None:
    """Refuse what full fine-tuning cannot do where each process moves its own part of the weights.

    Raises:
        ValueError: names the setting and the way out.
    """
    if settings.optimizer.name not in sharded_policies.OPTIMIZERS:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(sharded_policies.OPTIMIZERS)} with full "
            f"where the launcher shards weights (FSDP), got {settings.optimizer.name}, which "
            "needs whole matrices or keeps a state of its own; or launch with "
            "configs/accelerate/ddp_8gpu.yaml"
        )
    if settings.staleness:
        raise ValueError(
            "staleness must be 0 with full where the launcher shards weights (FSDP), got "
            f"{settings.staleness}, for which every process would hold all weights once more; or "
            "let a lora learn"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise ValueError(
            "fsdp_offload_params must be false with full, got true, which was never run; set "
            "full.copies=cpu, which keeps all policies but the trained one in the computer's memory"
        )
