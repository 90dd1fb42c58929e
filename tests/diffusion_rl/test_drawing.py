"""Videos drawn ahead are those of the earlier policy, learn by exact ratios and survive a stop."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion_rl.finetune
from diffusion_rl.checkpoint import restore, take_snapshot
from diffusion_rl.collect import collect
from diffusion_rl.drawing import Draws
from diffusion_rl.finetune import FinetuneState, begin, finetune
from diffusion_rl.lora import lora_state, set_lora_state
from diffusion_rl.policies import attach_policies
from diffusion_rl.prompt_sampling import PromptSamplingSettings
from diffusion_rl.reward_contract import Calls
from diffusion_rl.rewards import Reward
from diffusion_rl.row_kinds import RecordedSettings
from diffusion_rl.row_settings import SETTINGS, DdpoSettings, GrpoSettings
from diffusion_rl.updates import update_policy
from tests.diffusion_rl.test_finetune import PROMPTS, redness, settings_for, without_times
from tests.toy_gaussian import LORA, ToyGenerator

ROWS = [kind() for kind in SETTINGS.values() if issubclass(kind, RecordedSettings)]
RED = Reward("red", redness, calls=Calls(elsewhere=True))


def blind(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """Redness that ties for one prompt, so that what is drawn depends on what was judged."""
    score = redness(videos, prompts, fps=fps)
    return torch.where(torch.tensor([text == "bright" for text in prompts]), 1.0, score)


BLIND = Reward("blind", blind, calls=Calls(elsewhere=True))


def prepare(settings: Any) -> tuple[ToyGenerator, FinetuneState]:
    generator = ToyGenerator()
    attach_policies(generator.transformer, LORA)
    return generator, begin(generator, settings)


def stale(row: Any = None, updates: int = 4, **changes: Any) -> Any:
    return settings_for(row or GrpoSettings(), staleness=1, updates=updates, **changes)


def test_an_update_learns_from_the_policy_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: after the first, videos are those of the policy that the last update began with."""
    learnt, weights = [], []

    def spy(generator: Any, trajectory: Any, *rest: Any) -> Any:
        learnt.append(trajectory)
        return update_policy(generator, trajectory, *rest)

    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    settings = stale()
    generator, state = prepare(settings)
    weights.append(lora_state(generator.transformer))
    reports = []
    for report in finetune(generator, [RED], PROMPTS, settings, state):
        reports.append(report)
        weights.append(lora_state(generator.transformer))
    assert [report.staleness for report in reports] == [0, 1, 1, 1]
    other, _ = prepare(settings)
    embeddings = other.encode_prompts(PROMPTS)
    for update, drawer in ((1, 0), (2, 0), (3, 1), (4, 2)):
        set_lora_state(other.transformer, weights[drawer])
        expected = collect(other, embeddings, settings, step=update).trajectory
        assert torch.equal(learnt[update - 1].videos, expected.videos)
        assert torch.equal(learnt[update - 1].log_probs, expected.log_probs)
    # The ratio is to the policy that drew: it has left 1 before anything was learnt here.
    assert [report.ratio_deviation > 0 for report in reports] == [False, True, True, True]


def run(settings: Any, *, stop: int | None = None) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights and reports; with `stop` in two processes' worth of objects, through a checkpoint."""
    generator, state = prepare(settings)
    reports = []
    loop = finetune(generator, [BLIND], PROMPTS, settings, state)
    for report in loop:
        reports.append(without_times(report))
        if report.step == stop:
            break
    loop.close()
    if stop is not None:
        snapshot = take_snapshot(generator, state)
        generator, state = prepare(settings)
        restore(generator, state, snapshot)
        for report in finetune(generator, [BLIND], PROMPTS, settings, state):
            reports.append(without_times(report))
    return lora_state(generator.transformer), reports


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_stop_anywhere_changes_nothing(row: Any) -> None:
    sampling = PromptSamplingSettings(name="informative", floor=0.02, memory=1.0)
    settings = stale(row, updates=6, prompt_sampling=sampling)
    weights, reports = run(settings)
    for stop in (1, 3, 4):
        again, resumed = run(settings, stop=stop)
        assert resumed == reports
        assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_prompts_that_were_chosen_stay_chosen_whatever_is_known_by_now() -> None:
    settings = stale()
    generator, state = prepare(settings)
    weights = lora_state(generator.transformer)
    state.step, state.ahead = 3, {"policy": weights, "prompts": [2, 2], "policy_step": 2}
    embeddings = generator.encode_prompts(PROMPTS)
    draws = Draws(generator, embeddings, [RED], PROMPTS, settings, state)
    drawn, _ = draws.take()
    assert drawn.batch.prompt_index.tolist() == [2] * 8
    assert drawn.policy_step == 2
    assert state.ahead["policy_step"] == 3


def test_a_run_made_longer_is_the_longer_run() -> None:
    weights, reports = run(stale(updates=4))
    generator, state = prepare(stale(updates=2))
    short = list(finetune(generator, [BLIND], PROMPTS, stale(updates=2), state))
    snapshot = take_snapshot(generator, state)
    generator, state = prepare(stale(updates=4))
    restore(generator, state, snapshot)
    rest = list(finetune(generator, [BLIND], PROMPTS, stale(updates=4), state))
    assert [without_times(report) for report in short + rest] == reports
    again = lora_state(generator.transformer)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_next_videos_are_drawn_while_these_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward answers of update 1 only once update 2 has been drawn: else this would hang."""
    drawn, second = [], threading.Event()

    def spy(*arguments: Any, step: int, **rest: Any) -> Any:
        found = collect(*arguments, step=step, **rest)
        drawn.append(step)
        if step == 2:
            second.set()
        return found

    def patient(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        assert second.wait(20), "update 2 was not drawn meanwhile"
        return redness(videos, prompts, fps=fps)

    monkeypatch.setattr("diffusion_rl.drawing.collect", spy)
    reward = Reward("patient", patient, calls=Calls(elsewhere=True))
    settings = stale(updates=3)
    generator, state = prepare(settings)
    assert len(list(finetune(generator, [reward], PROMPTS, settings, state))) == 3
    assert drawn == [1, 2, 3]


def test_a_reward_here_is_asked_in_the_order_of_updates() -> None:
    """Its random numbers must be those of a run that was not stopped."""
    threads, seen = set(), []

    def here(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        threads.add(threading.current_thread())
        seen.append(torch.rand(()).item())
        return redness(videos, prompts, fps=fps)

    settings = stale(updates=3)
    generator, state = prepare(settings)
    torch.manual_seed(0)
    loop = finetune(generator, [RED, Reward("here", here)], PROMPTS, settings, state)
    counts = [len(seen) for _ in loop]
    assert counts == [1, 2, 3]
    assert threads == {threading.main_thread()}


def test_history_rows_remember_in_order() -> None:
    row = DdpoSettings(history_capacity=6, history_min_count=6)
    settings = stale(row, updates=3)
    generator, state = prepare(settings)
    histories: Iterator[Any] = (
        copy.deepcopy(state.history) for _ in finetune(generator, [RED], PROMPTS, settings, state)
    )
    counts = [sum(map(len, history.values())) for history in histories]
    assert counts[0] == 8


@pytest.mark.parametrize("name", ["nft", "awm", "raft"])
def test_rows_without_ratios_to_the_drawer_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"staleness must be 0 with algorithm '{name}', got 1; it"):
        settings_for(SETTINGS[name](), staleness=1)
    with pytest.raises(ValueError, match="staleness must be 0 or 1, got 2"):
        settings_for(GrpoSettings(), staleness=2)


def test_videos_that_are_not_finite_are_said_to_be_whose_fault_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_for(GrpoSettings(), updates=3)
    generator, state = prepare(settings)
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda latent: decode(latent) * torch.nan)
    with pytest.raises(ValueError, match=r"videos of update 1 must be finite, .*generator.dtype="):
        next(finetune(generator, [RED], PROMPTS, settings, state))
    monkeypatch.setattr(generator, "decode", decode)
    loop = finetune(generator, [RED], PROMPTS, settings, state)
    next(loop)

    def broken(latent: Tensor) -> Tensor:
        videos = decode(latent)
        videos[0, 0] = torch.inf
        return videos

    monkeypatch.setattr(generator, "decode", broken)
    message = r"videos of update 2 must be .* in \d+ of \d+; the policy of update 1 has diverged"
    with pytest.raises(ValueError, match=message):
        next(loop)
