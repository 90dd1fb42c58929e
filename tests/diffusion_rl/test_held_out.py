"""Evaluation rewards see the same videos each time, train nothing, and feed the alarm."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rl.finetune import FinetuneState, begin, finetune, watch
from diffusion_rl.guards import GuardSettings, contrast
from diffusion_rl.held_out import EvaluationSettings, HeldOut
from diffusion_rl.lora import lora_state
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.policies import attach_policies, saved_policy
from diffusion_rl.prompt_sampling import PromptSamplingSettings
from diffusion_rl.rewards import Reward, RewardSettings
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_settings import GrpoSettings, NftSettings
from diffusion_rl.sampling import sample_videos
from diffusion_rl.trends import REWARD, TrendSettings
from tests.diffusion_rl.test_finetune import PROMPTS, RED, redness, settings_for
from tests.toy_gaussian import LORA, ToyGenerator

BLUE = Reward("blue", lambda videos, prompts, *, fps: videos[:, :, 2].mean((1, 2, 3)))
UNSEEN = ["bright", "plain"]


def settings(**changes: Any) -> EvaluationSettings:
    given = {"rewards": (RewardSettings(name="blue", target="a:b"),), **changes}
    return EvaluationSettings(**given)


EAGER = {
    "algorithm": GrpoSettings(clip_range=0.02, inner_steps=2),
    "optimizer": OptimizerSettings(learning_rate=3e-2),
    "rollout": RolloutSettings(num_inference_steps=4, prompts_per_update=4),
}
"""Learns fast enough to show a trend in few updates."""


def run(
    held_out: Any,
    updates: int = 5,
    rewards: Any = (RED,),
    prompts: Any = PROMPTS,
    **changes: Any,
) -> Any:
    own = settings_for(**{"algorithm": GrpoSettings(), "updates": updates, **changes})
    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA, average=True)
    state = begin(generator, own)
    embeddings = generator.encode_prompts(UNSEEN)
    if held_out is not None:
        held_out = HeldOut(held_out, [BLUE], *((UNSEEN, embeddings) if held_out.prompts else ()))
    for report in finetune(generator, rewards, prompts, own, state, held_out=held_out):
        yield report, generator, state


def test_held_out_videos_are_those_of_what_would_be_saved() -> None:
    measured = []
    own = settings(prompts="a file", every=2, videos_per_prompt=3, seed=7)
    slow = OptimizerSettings(learning_rate=1e-2, average_decay=0.9)
    for report, generator, _ in run(own, optimizer=slow):
        if not report.evaluation:
            assert report.evaluation_seconds == 0.0
            continue
        with saved_policy(generator.transformer):
            texts = [text for text in UNSEEN for _ in range(3)]
            videos = sample_videos(generator, texts, range(7, 13), num_inference_steps=4)
        assert report.evaluation == {"blue": pytest.approx(videos[:, :, 2].mean().item())}
        measured.append(report.step)
    assert measured == [1, 2, 4]


def test_measuring_changes_nothing_and_is_counted() -> None:
    plain = list(run(None))
    seen = list(run(settings(prompts="a file", every=2, videos_per_prompt=3)))
    own = list(run(settings(every=2)))
    for found in (seen, own):
        first, second = (lora_state(one[-1][1].transformer) for one in (plain, found))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert [one.reward for one, *_ in found] == [one.reward for one, *_ in plain]
    last = plain[-1][0]
    assert seen[-1][0].videos_generated == last.videos_generated + 3 * 6
    assert seen[-1][0].reward_calls == last.reward_calls + 3 * 6
    assert own[-1][0].videos_generated == last.videos_generated
    assert own[-1][0].reward_calls == last.reward_calls + 3 * 8
    assert own[0][0].evaluation["blue"] != seen[0][0].evaluation["blue"]
    assert plain[-1][0].evaluation == {}


def test_an_evaluation_reward_that_fails_is_named() -> None:
    broken = Reward("broken", lambda videos, prompts, *, fps: 1 / 0)
    own = settings_for(GrpoSettings(), updates=1)
    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA)
    loop = finetune(generator, [RED], PROMPTS, own, held_out=HeldOut(settings(), [broken]))
    with pytest.raises(RuntimeError, match="reward 'broken' raised ZeroDivisionError"):
        list(loop)


def test_evaluation_rewards_are_missed_each_by_itself() -> None:
    """They are not added up, so that no video needs to be judged by all of them."""

    def half(first: int) -> Reward:
        scores = torch.full((8,), torch.nan)
        scores[first::2] = 1.0 + first
        return Reward(f"half{first}", lambda videos, prompts, *, fps: scores)

    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA)
    held_out = HeldOut(settings(), [half(0), half(1)])
    own = settings_for(GrpoSettings(), updates=1)
    (report,) = finetune(generator, [RED], PROMPTS, own, held_out=held_out)
    assert report.evaluation == {"half0": 1.0, "half1": 2.0}


def test_what_the_reward_is_paid_for_with_raises_the_alarm_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A dark red film scores best and costs the blue that a held-out judge looks for."""

    def greedy(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        return redness(videos, prompts, fps=fps) - BLUE.function(videos, prompts, fps=fps)

    rewards = [Reward("greedy", greedy), dataclasses.replace(BLUE, name="logged", weight=0.0)]
    with caplog.at_level(logging.WARNING):
        found = list(
            run(
                settings(prompts="a file", every=1, videos_per_prompt=4),
                updates=20,
                rewards=rewards,
                prompts=["plain"],
                hacking_alarm=TrendSettings(window=10),
                **EAGER,
            )
        )
    falling = {name for report, *_ in found for name in report.hacking}
    assert {"evaluation/blue", "rewards/logged"} <= falling
    assert found[3][0].hacking == ()
    said = [one.getMessage() for one in caplog.records if "possible reward hacking" in one.message]
    assert 1 <= sum("evaluation/blue falls" in one for one in said) <= 2


def test_a_guards_level_that_the_reward_is_paid_for_with_raises_the_alarm() -> None:
    """It falls long before it comes to the floor at which the guard itself would speak."""

    def flat(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        return -contrast(videos)

    guards = (GuardSettings(statistic="contrast", weight=0.0, floor=0.01),)
    alarm = TrendSettings(window=8)
    rewards = [Reward("flat", flat)]
    found = list(run(None, 12, rewards, ["plain"], hacking_alarm=alarm, guards=guards, **EAGER))
    falling = {name for report, *_ in found for name in report.hacking}
    assert falling == {"contrast"}
    assert not any(report.alarms for report, *_ in found)


def test_what_a_run_no_longer_measures_raises_no_alarm() -> None:
    """As after going on without an evaluation reward that fell until then."""
    rising = [[step, float(step)] for step in range(1, 21)]
    fallen = [[step, -float(step)] for step in range(1, 21)]
    gone = ("evaluation/gone", "evaluation/blue", "rewards/old", "motion")
    alarm = settings_for(GrpoSettings(), hacking_alarm=TrendSettings(window=20))

    def falling(held_out: HeldOut | None) -> tuple[tuple[str, ...], set[str]]:
        own = FinetuneState(torch.optim.SGD([torch.zeros(1)]), step=21)
        own.series = {REWARD: rising, **dict.fromkeys(gone, fallen)}
        numbers = {"reward": 21.0, "guards": {}, "rewards": {"red": 0.5}}
        return watch(numbers, {}, [RED], held_out, alarm, own), set(own.series)

    assert falling(None) == ((), {REWARD, "rewards/red"})
    # One that is not due in this update still counts.
    names = {REWARD, "rewards/red", "evaluation/blue"}
    assert falling(HeldOut(settings(), [BLUE])) == (("evaluation/blue",), names)


def test_a_reward_of_negative_weight_ought_to_fall() -> None:
    rewards = [RED, dataclasses.replace(BLUE, weight=-1.0)]
    alarm = TrendSettings(window=8)
    found = list(run(None, 12, rewards, ["plain"], hacking_alarm=alarm, **EAGER))
    assert found[-1][0].rewards["blue"] < found[0][0].rewards["blue"]
    assert all("rewards/blue" not in report.hacking for report, *_ in found)


def test_prompts_that_tie_are_drawn_less_often() -> None:
    def blind(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        score = redness(videos, prompts, fps=fps)
        return torch.where(torch.tensor([text == "bright" for text in prompts]), 1.0, score)

    sampling = PromptSamplingSettings(name="informative", floor=0.05)
    *_, (_, _, state) = run(
        None, updates=24, rewards=[Reward("blind", blind)], prompt_sampling=sampling
    )
    groups = {PROMPTS[number]: one["groups"] for number, one in state.prompts.items()}
    assert sum(groups.values()) == 24 * 2
    assert 0 < groups["bright"] < 10  # 16 in passes over all three.
    assert state.prompts[PROMPTS.index("bright")]["tied_groups"] == groups["bright"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": ()}, "rewards must be at least one and have different names, got"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^31\), got -1"),
        ({"videos_per_prompt": 2}, "videos_per_prompt must be left out without prompts, got 2"),
        ({"seed": 7}, "seed must be left out without prompts, got 7"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_a_row_that_keeps_an_old_policy_is_measured_too() -> None:
    own = settings_for(NftSettings(), updates=2)
    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA, old_policy=True)
    held_out = HeldOut(settings(prompts="f"), [BLUE], UNSEEN, generator.encode_prompts(UNSEEN))
    reports = list(finetune(generator, [RED], PROMPTS, own, held_out=held_out))
    assert reports[0].evaluation["blue"] > 0
