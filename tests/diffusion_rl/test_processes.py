"""Several processes over gloo do what one does: the same scores, advantages, weights, reports."""

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor

import diffusion_rl.finetune
from diffusion_rl import processes
from diffusion_rl.algorithms import algorithm
from diffusion_rl.credit import Credit, CreditSettings
from diffusion_rl.finetune import FinetuneSettings, begin, finetune, measure_base
from diffusion_rl.full_policies import FullSettings
from diffusion_rl.guards import GuardSettings
from diffusion_rl.held_out import EvaluationSettings, HeldOut
from diffusion_rl.lora import LoraSettings, attach_lora
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.policies import attach_policies, policies_of
from diffusion_rl.prompt_sampling import PromptSamplingSettings
from diffusion_rl.reward_contract import RewardSettings
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings, Trajectory
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import (
    AwmSettings,
    DdpoSettings,
    GrpoSettings,
    NftSettings,
    OnlineDpoSettings,
    RaftSettings,
)
from diffusion_rl.shares import chunks_of_steps, own_share
from diffusion_rl.tracking import AccelerateTracker
from diffusion_rl.updates import UpdateStatistics, update_policy
from tests.several import run_on
from tests.toy_gaussian import LORA, ToyGenerator

PROMPTS = ["plain", "bright", "plain and small"]
TIMES = {"seconds", *(f"{name}_seconds" for name in ("collect", "judge", "update", "evaluation"))}


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Any]:
    """The left half's red; one video in five unjudged, one in three with a fault where it is least
    red, and no blame at all where no video of the call has one."""
    red = videos[:, :, 0, :, :2].mean((1, 2, 3))
    kind = (videos.flatten(1).sum(1) * 1000).long()
    blame = (1 - videos[:, :, 0]) * (kind % 3 == 0).view(-1, 1, 1, 1)
    return {
        "score": red.masked_fill(kind % 5 == 0, math.nan),
        "blame": blame if bool(blame.any()) else None,
        "reports": [f"{value:.6f}" for value in red.tolist()],
    }


def settings_for(row: AlgorithmSettings, **changes: Any) -> FinetuneSettings:
    settings = FinetuneSettings(
        algorithm=row,
        rollout=RolloutSettings(
            num_inference_steps=4,
            stochastic_steps=2,
            prompts_per_update=3,
            videos_per_prompt=4,
            micro_batch=3,
        ),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        guards=tuple(
            GuardSettings(statistic=name, floor=1.0) for name in ("contrast", "diversity")
        ),
        updates=4,
    )
    return dataclasses.replace(settings, **changes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its settings, what learns, and whether evaluation rewards watch."""

    settings: FinetuneSettings
    learner: LoraSettings | FullSettings = LORA
    evaluation: EvaluationSettings | None = None

    def held_out(self, generator: ToyGenerator) -> HeldOut | None:
        if self.evaluation is None:
            return None
        unseen = ["dim", "bright and small", "grey", "small", "grey and small"]
        encoded = generator.encode_prompts(unseen)
        own = (unseen, encoded) if self.evaluation.prompts else ()
        return HeldOut(self.evaluation, [Reward("held", redness)], *own)


def trained(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run's reports, weights, and what each of its updates learnt from."""
    settings = case.settings
    seen: list[dict[int, float]] = []

    def spy(generator: Any, trajectory: Trajectory, credit: Credit, *rest: Any) -> UpdateStatistics:
        seen.append(dict(zip(trajectory.rows.tolist(), credit.advantages.tolist(), strict=True)))
        return update_policy(generator, trajectory, credit, *rest)

    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    generator = ToyGenerator()
    old = algorithm(settings.algorithm.name).uses_old_policy
    attach_policies(generator.transformer, case.learner, old_policy=old)
    before = policies_of(generator.transformer).state()
    state, held_out = begin(generator, settings), case.held_out(generator)
    rewards = [Reward("red", redness)]
    reports = [
        {name: value for name, value in dataclasses.asdict(report).items() if name not in TIMES}
        for report in finetune(generator, rewards, PROMPTS, settings, state, held_out=held_out)
    ]
    return {
        "reports": reports,
        "before": before,
        "weights": policies_of(generator.transformer).state(),
        "advantages": seen,
        "history": state.history,
        "levels": state.running_levels,
    }


ROWS = {
    "grpo": settings_for(GrpoSettings(clip_range=0.02, kl_weight=0.1)),
    "two optimiser steps": settings_for(GrpoSettings(clip_range=0.02, inner_steps=2)),
    "separate rewards": settings_for(
        GrpoSettings(clip_range=0.02, advantage_std="batch", advantage_rewards="separate")
    ),
    "history": settings_for(DdpoSettings(clip_range=0.02, history_min_count=4)),
    "shared noise": settings_for(
        GrpoSettings(clip_range=0.02),
        rollout=dataclasses.replace(
            settings_for(GrpoSettings()).rollout, shared_noise=True, eligible_steps=3
        ),
        credit=CreditSettings(name="random", mix=0.7),
    ),
    "steps of groups": settings_for(
        GrpoSettings(clip_range=0.02, step_weighting="flash", kl_weight=0.1),
        rollout=dataclasses.replace(
            settings_for(GrpoSettings()).rollout, steps_of="group", stochastic_steps=1
        ),
    ),
    "grounded": settings_for(
        GrpoSettings(clip_range=0.02), credit=CreditSettings(name="grounded", clip="position")
    ),
    "nft": settings_for(NftSettings(), credit=CreditSettings(name="grounded", balanced=True)),
    "awm": settings_for(AwmSettings(inner_steps=2, noise_levels=2)),
    "online_dpo": settings_for(OnlineDpoSettings(pairs=2, refresh_every=2, inner_steps=2)),
    "raft": settings_for(RaftSettings(keep=2, inner_steps=2)),
    "stale": settings_for(GrpoSettings(clip_range=0.02), staleness=1),
    "stale and informative": settings_for(
        GrpoSettings(clip_range=0.02),
        staleness=1,
        prompt_sampling=PromptSamplingSettings(name="informative"),
    ),
}
OWN_VIDEOS = EvaluationSettings(rewards=(RewardSettings(name="held", target="here:no"),), every=2)
CASES = {
    **{name: Case(settings) for name, settings in ROWS.items()},
    "full": Case(ROWS["grpo"], FullSettings()),
    "full, on the cpu": Case(ROWS["nft"], FullSettings(copies="cpu")),
    "evaluation of own videos": Case(ROWS["grpo"], evaluation=OWN_VIDEOS),
    "evaluation of unseen prompts": Case(
        ROWS["nft"], evaluation=dataclasses.replace(OWN_VIDEOS, prompts="unseen.txt")
    ),
}


COUNTS = (2, 4, 5)  # Of 12 videos in 3 groups: even shares, a group on several, uneven shares.


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    """Every case on each number of processes: what each process ends with."""

    def every() -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            return {name: trained(case, monkeypatch) for name, case in CASES.items()}

    return {1: [every()], **{count: run_on(count, every) for count in COUNTS}}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_several_processes_learn_what_one_learns(
    name: str, count: int, runs: dict[int, list[dict[str, Any]]]
) -> None:
    alone, group = runs[1][0][name], [one[name] for one in runs[count]]
    before = alone["before"]
    moved = [(value - before[key]).abs().max() for key, value in alone["weights"].items()]
    assert max(moved) > 1e-3
    assert any(report["missing_share"] for report in alone["reports"])
    for one in group:
        for key, value in alone["weights"].items():
            torch.testing.assert_close(one["weights"][key], value, rtol=0, atol=1e-6)
            assert torch.equal(one["weights"][key], group[0]["weights"][key])
        assert one["history"].keys() == alone["history"].keys()
        for prompt, past in alone["history"].items():
            assert one["history"][prompt] == pytest.approx(past, abs=1e-6)
        assert one["levels"] == pytest.approx(alone["levels"], abs=1e-6)
        assert str(one["reports"]) == str(group[0]["reports"])
    for update, expected in enumerate(alone["advantages"]):
        shares = [one["advantages"][update] for one in group]
        together = {row: value for share in shares for row, value in share.items()}
        assert sum(map(len, shares)) == len(together)
        assert together == pytest.approx(expected, abs=1e-5)
    for report, expected in zip(group[0]["reports"], alone["reports"], strict=True):
        assert flat(report) == pytest.approx(flat(expected), rel=1e-4, abs=1e-6, nan_ok=True)


def flat(report: dict[str, Any]) -> dict[str, float]:
    """The report's numbers by name."""
    numbers = {key: value for key, value in report.items() if isinstance(value, float | int)}
    for name in ("rewards", "guards", "evaluation"):
        numbers |= {f"{name}/{key}": value for key, value in report[name].items()}
    return numbers


def failing(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """A judge that the last process cannot reach."""
    if processes.rank() == processes.count() - 1:
        raise OSError("the judge is gone")
    return videos.mean((1, 2, 3, 4))


def run_failing() -> list[Any]:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    settings = settings_for(GrpoSettings(clip_range=0.02), guards=())
    return list(finetune(generator, [Reward("red", failing)], PROMPTS, settings))


def test_a_reward_that_fails_on_one_process_stops_all() -> None:
    first, second = run_on(2, run_failing)
    assert str(second) == (
        "RewardFailed: reward 'red' raised OSError: the judge is gone; nothing saved so far is "
        "lost: mend it and run the same command again, which goes on from what is saved"
    )
    assert "process 1 of 2 failed while judging videos: RewardFailed: reward 'red'" in str(first)


def unjudging(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """Judges nothing on the last process and everything elsewhere."""
    score = videos.mean((1, 2, 3, 4))
    return score * math.nan if processes.rank() == processes.count() - 1 else score


def run_unjudging(limit: float) -> list[Any]:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    row = GrpoSettings(clip_range=0.02)
    settings = settings_for(row, missing_limit=limit, updates=1, guards=())
    return list(finetune(generator, [Reward("half", unjudging)], PROMPTS, settings))


def test_the_limit_of_unjudged_videos_is_of_all_of_them() -> None:
    """A process of which no video was judged learns nothing and takes part nevertheless."""
    for found in run_on(2, lambda: run_unjudging(0.5)):
        assert found[0].missing_share == 0.5
    for found in run_on(2, lambda: run_unjudging(0.4)):
        assert "NaN for 6 of 12 videos, more than missing_limit 0.4" in str(found)


def test_as_many_processes_as_videos_measure_the_base() -> None:
    rollout = RolloutSettings(
        **{"num_inference_steps": 4, "stochastic_steps": 1},
        **{"prompts_per_update": 1, "videos_per_prompt": 3},
    )
    settings = settings_for(GrpoSettings(), rollout=rollout)

    def measured() -> tuple[dict[str, float], int]:
        generator = ToyGenerator()
        attach_policies(generator.transformer, LORA)
        state = begin(generator, settings)
        measure_base(generator, generator.encode_prompts(PROMPTS), settings, state)
        return state.reference_levels, state.videos_generated

    levels, videos = measured()
    assert videos == 4  # Pairs of as many videos as an update has, at least.
    for found in run_on(3, measured):
        assert isinstance(found, tuple), found
        assert found == (pytest.approx(levels), videos)


def test_shares_are_even_in_every_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(own_share(18, size=2, steps=3))
    assert sorted(row for share in found for row in share.rows.tolist()) == list(range(18))
    for share in found:
        steps = chunks_of_steps(share.rows, 18, size=2, steps=3)
        assert [[part.stop - part.start for part in step] for step in steps] == [[2], [2], [2]]
        assert share.parts == [part for step in steps for part in step]
    with pytest.raises(ValueError, match="must be at least the 3 processes, got 2 videos"):
        own_share(2, size=2)
    # Steps of one video each cannot be shared out; the videos then are.
    assert own_share(3, size=1, steps=3).rows.tolist() == [2]


def test_gradients_are_summed_and_those_of_no_process_stay_away() -> None:
    def summed() -> list[Any]:
        rank = processes.rank()
        weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
        weights[0].grad = torch.full((3,), 1.0 + rank)
        if rank == 1:
            weights[1].grad = torch.ones(3)
        processes.add_up_gradients(weights)
        return [None if one.grad is None else one.grad.tolist() for one in weights]

    assert run_on(2, summed) == [[[3.0] * 3, [1.0] * 3, None]] * 2


def test_a_process_that_is_killed_ends_the_others() -> None:
    def killed() -> None:
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.gather_objects("here")

    first, second = run_on(2, killed)
    assert second == -signal.SIGKILL
    assert "RuntimeError" in str(first)


def test_a_child_does_not_look_for_the_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("OWN", "kept")
    (found,) = run_on(1, processes.environment_alone)
    assert found["OWN"] == "kept"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & found.keys()
    assert "FSDP_VERSION" not in found


def test_a_gpu_of_its_own_number_is_refused_where_each_process_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must be 'cuda' where several processes run, got cuda:1"):
        processes.start("cuda:1")


class Listed(GeneralTracker):
    """A tracker that remembers the steps it was told of."""

    name = "listed"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append("settings")

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.seen.append(step)


def test_trackers_of_the_first_process_wait_for_no_other(tmp_path: Path) -> None:
    def track() -> list[Any]:
        listed = Listed()
        if processes.is_main():
            tracker = AccelerateTracker([listed], tmp_path, "run", {})
            tracker.write(One(step=3))
        processes.gather_objects(None)
        if processes.is_main():
            tracker.close()
        return listed.seen

    assert run_on(2, track) == [["settings", 3], []]


@dataclasses.dataclass
class One:
    """A report of one number."""

    step: int
