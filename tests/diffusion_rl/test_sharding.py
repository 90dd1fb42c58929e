"""What of a launcher's wishes is done, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffusion_rl.credit import Credit
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import LoraSettings, attach_lora, trained_parameters
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer
from diffusion_rl.rollout import RolloutSettings, rollout
from diffusion_rl.row_settings import GrpoSettings
from diffusion_rl.sharding import (
    check_precision,
    device_of_passes,
    in_step,
    is_sharded,
    rows_in_step,
    shard,
    wants_shards,
)
from diffusion_rl.shares import own_share
from diffusion_rl.updates import UpdateStatistics, update_policy
from tests.several import run_on
from tests.tiny_wan import SIZE, build_tiny_wan

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_only_what_the_launcher_asks_for_and_can_be_done_is_done() -> None:
    assert not wants_shards({})
    assert wants_shards(FSDP)
    with pytest.raises(ValueError, match="fsdp_version must be 2, got 1"):
        wants_shards({**FSDP, "FSDP_VERSION": "1"})
    assert not wants_shards({"ACCELERATE_USE_DEEPSPEED": "true"})


def test_a_precision_that_nothing_heeds_is_refused() -> None:
    for asked in ("no", "bf16"):
        check_precision("bfloat16", {"ACCELERATE_MIXED_PRECISION": asked})
    check_precision("float32", {})
    with pytest.raises(ValueError, match="must be 'no' or that of generator.dtype, got bf16 and"):
        check_precision("float32", {"ACCELERATE_MIXED_PRECISION": "bf16"})


def sharded(**launcher: str) -> tuple[nn.Module, int]:
    """A tiny Wan in half precision, whose norms stay in float32, and its weights before."""
    transformer = build_tiny_wan().transformer.requires_grad_(False).bfloat16()
    transformer.condition_embedder.float()
    attach_lora(transformer, LoraSettings(rank=2))
    before = sum(one.numel() for one in transformer.parameters())
    shard(transformer, trained_parameters(transformer), FSDP | launcher)
    return transformer, before


def test_weights_of_a_rarer_type_and_what_learns_stay_whole() -> None:
    def names() -> dict[str, bool]:
        transformer, _ = sharded()
        assert is_sharded(transformer)
        return {name: hasattr(one, "to_local") for name, one in transformer.named_parameters()}

    for found in run_on(2, names):
        assert isinstance(found, dict), found
        assert {name for name, split in found.items() if not split} == {
            name for name in found if "lora_" in name or "condition_embedder" in name
        }
        assert len(set(found.values())) == 2


def test_parts_that_wait_on_the_cpu_come_together_on_the_gpu() -> None:
    """Without a GPU: a mesh is told to be one of GPUs."""
    transformer = build_tiny_wan().transformer
    assert device_of_passes(transformer) is None

    def found() -> list[torch.device | None]:
        generator = WanGenerator(build_tiny_wan(), **SIZE)
        attach_lora(generator.transformer, LoraSettings(rank=2))
        shard(generator.transformer, trained_parameters(generator.transformer), FSDP)
        before = generator.device
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceMesh, "device_type", "cuda")
            patch.setattr(torch.cuda, "current_device", lambda: 1)
            return [before, generator.device]

    for said in run_on(2, found):
        assert said == [torch.device("cpu"), torch.device("cuda", 1)]


def test_blocks_that_are_not_there_are_refused() -> None:
    (said,) = run_on(1, lambda: sharded(FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaBlock"))
    assert "must name blocks of the transformer, got ['LlamaBlock'], and Wan" in str(said)


def test_processes_pass_through_sharded_weights_equally_often() -> None:
    whole = nn.Linear(1, 1)
    assert in_step(whole, [slice(0, 2), slice(2, 3)]) == [slice(0, 2), slice(2, 3)]
    assert in_step(whole, [], slice(0, 1)) == []

    def passes(counts: tuple[int, int], spare: slice | None = None) -> list[slice]:
        transformer, _ = sharded()
        number = counts[torch.distributed.get_rank()]
        return in_step(transformer, [slice(place, place + 1) for place in range(number)], spare)

    first, second = run_on(2, lambda: passes((3, 1)))
    assert first == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert second == [slice(0, 1)] * 3
    assert run_on(2, lambda: passes((0, 0))) == run_on(2, lambda: passes((0, 0), slice(4, 5)))
    assert run_on(2, lambda: passes((0, 0))) == [[], []]
    spare = slice(4, 5)
    assert run_on(2, lambda: passes((0, 2), spare)) == [[spare] * 2, [slice(0, 1), slice(1, 2)]]
    for said in run_on(2, lambda: passes((0, 2))):
        assert "reward must judge at least one video of each process" in str(said)
        assert "got passes [0, 2]" in str(said)


def test_a_process_without_videos_in_an_optimiser_step_passes_along() -> None:
    """Of two steps' videos one process's are not judged: it learns what one process alone learns.

    The loss of what it passes for the others' sake counts for nothing.
    """
    algorithm = GrpoSettings(clip_range=0.5, inner_steps=2)
    options = RolloutSettings(num_inference_steps=3, stochastic_steps=1, micro_batch=1)
    judged = torch.tensor([True, False, True, True])  # The first step is of videos 0 and 1.

    def learnt(split: bool) -> tuple[UpdateStatistics, list[Tensor]]:
        generator = WanGenerator(build_tiny_wan(), **SIZE)
        attach_lora(generator.transformer, LoraSettings(rank=2))
        parameters = trained_parameters(generator.transformer)
        if split:
            shard(generator.transformer, parameters, FSDP)
        trajectory = rollout(
            *(generator, generator.encode_prompts(["a", "b"]), torch.tensor([0, 0, 1, 1])),
            *(range(4), options),
            stochastic=(0,),
            share=own_share(4, 1, 2),
        ).keep(judged)
        credit = Credit(torch.tensor([1.0, 0.5, -1.0, 0.5])[judged][trajectory.rows])
        optimizer = build_optimizer(parameters, OptimizerSettings(learning_rate=1e-2))
        source = torch.Generator().manual_seed(0)
        done = update_policy(generator, trajectory, credit, algorithm, options, optimizer, source)
        return done, [one.detach().clone() for one in parameters]

    expected, weights = learnt(split=False)
    for found in run_on(2, lambda: learnt(split=True)):
        assert isinstance(found, tuple), found
        statistics, own = found
        assert statistics.loss == pytest.approx(expected.loss, abs=1e-6)
        for one, other in zip(own, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_processes_pass_rows_through_the_same_of_several_transformers() -> None:
    no, both = [False, False], [True, True]
    chosen = ((both, no, no), (no, no, [True, False]))

    def passed(whole: bool) -> list[list[int]]:
        transformer = nn.Linear(1, 1) if whole else sharded()[0]
        own = [torch.tensor(one) for one in chosen[torch.distributed.get_rank()]]
        return [rows.tolist() for rows in rows_in_step(transformer, own)]

    assert run_on(2, lambda: passed(whole=False)) == [[[0, 1], [], [0]], [[0], [], [0]]]
    assert run_on(2, lambda: passed(whole=True)) == [[[0, 1], [], []], [[], [], [0]]]
