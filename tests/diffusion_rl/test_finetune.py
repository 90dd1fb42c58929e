"""The loop: what it reports, what it draws, and every way a reward can spoil a run."""

import dataclasses
import math
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffusion_rl.drawing
import diffusion_rl.finetune
from diffusion_rl.advantages import group_advantages, history_advantages, separate_advantages
from diffusion_rl.algorithms import algorithm
from diffusion_rl.collect import FIRST_TRAINING_SEED, Batch, choose_prompts, collect
from diffusion_rl.finetune import (
    FinetuneSettings,
    FinetuneState,
    StepReport,
    begin,
    compare,
    finetune,
)
from diffusion_rl.guards import GuardSettings
from diffusion_rl.lora import OLD, attach_lora, lora_state
from diffusion_rl.lora_files import load_lora, save_lora
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.policies import saved_policy
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings, Trajectory
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import SETTINGS, DdpoSettings, GrpoSettings, NftSettings
from diffusion_rl.sampling import sample_videos
from diffusion_rl.updates import UpdateStatistics, update_policy
from tests.toy_gaussian import LORA, ToyGenerator

PROMPTS = ["plain", "bright", "plain and small"]
ROLLOUT = RolloutSettings(
    num_inference_steps=4, stochastic_steps=2, prompts_per_update=2, videos_per_prompt=4
)
TIMES = ("collect_seconds", "judge_seconds", "update_seconds", "seconds")
EVERY = [row() for row in SETTINGS.values()]


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    return videos[:, :, 0].mean((1, 2, 3))


RED = Reward("red", redness)


def settings_for(algorithm: AlgorithmSettings, **changes: object) -> FinetuneSettings:
    settings = FinetuneSettings(
        algorithm=algorithm,
        rollout=ROLLOUT,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        updates=2,
    )
    return dataclasses.replace(settings, **changes)


def run(
    settings: FinetuneSettings, *rewards: Reward, state: FinetuneState | None = None
) -> tuple[ToyGenerator, list[StepReport]]:
    generator = ToyGenerator()
    old = algorithm(settings.algorithm.name).uses_old_policy
    attach_lora(generator.transformer, LORA, old_policy=old)
    return generator, list(finetune(generator, rewards or [RED], PROMPTS, settings, state))


def without_times(report: StepReport) -> dict[str, object]:
    numbers = dataclasses.asdict(report)
    # NaN is not equal to itself.
    return {key: str(value) for key, value in numbers.items() if key not in TIMES}


@pytest.mark.parametrize("algorithm", EVERY)
def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(
    algorithm: AlgorithmSettings,
) -> None:
    runs = [run(settings_for(algorithm, seed=seed)) for seed in (0, 0, 1)]
    reports = [[without_times(report) for report in found] for _, found in runs]
    states = [lora_state(generator.transformer) for generator, _ in runs]
    assert reports[0] == reports[1] != reports[2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_report_says_what_happened() -> None:
    guards = (GuardSettings(statistic="contrast"),)
    shade = Reward("shade", lambda videos, prompts, *, fps: videos.mean((1, 2, 3, 4)), weight=0.0)
    _, reports = run(settings_for(GrpoSettings(), guards=guards), RED, shade)
    first, second = reports
    assert (first.step, second.step) == (1, 2)
    # 8 for the self-check, 8 for the guards' reference level, then 8 an update.
    assert (first.videos_generated, second.videos_generated) == (24, 32)
    assert (first.reward_calls, second.reward_calls) == (16, 32)
    assert first.rewards.keys() == {"red", "shade"}
    assert first.reward == pytest.approx(first.rewards["red"])
    assert 0.9 < first.guards["contrast"] < 1.1
    assert first.penalty == pytest.approx(0.0, abs=0.01)
    assert first.alarms == ()
    assert first.ratio_deviation == 0.0  # One optimiser step, on-policy.
    assert first.clip_fraction == 0.0
    assert first.missing_share == first.tied_share == 0.0
    assert 0.5 < first.advantage_size < 1.5
    assert first.score_std > 0
    assert first.grad_norm > 0
    spent = first.collect_seconds + first.judge_seconds + first.update_seconds
    assert first.seconds == pytest.approx(spent)
    assert second.seconds > first.seconds


def test_an_updates_videos_are_gone_before_the_next_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def spy(*args: object, **options: object) -> Batch:
        alive.extend(one() is not None for one in drawn)
        batch = collect(*args, **options)
        drawn.append(weakref.ref(batch.trajectory.videos))
        return batch

    monkeypatch.setattr(diffusion_rl.drawing, "collect", spy)
    kept = run(settings_for(GrpoSettings(), updates=3))
    assert len(kept[1]) == len(drawn) == 3
    assert alive == [False] * 3


def test_the_old_policy_draws_the_videos_and_follows() -> None:
    algorithm = NftSettings(old_decay_rate=1.0, old_decay_limit=0.9)
    generator, _ = run(settings_for(algorithm, updates=1))
    old, trained = lora_state(generator.transformer, OLD), lora_state(generator.transformer)
    start = ToyGenerator()
    attach_lora(start.transformer, LORA)
    fresh = lora_state(start.transformer)
    for name in fresh:
        torch.testing.assert_close(old[name], 0.9 * fresh[name] + 0.1 * trained[name])
    batch = [
        collect(one, one.encode_prompts(PROMPTS), settings_for(algorithm), step=1)
        for one in (generator, _with_old(old))
    ]
    torch.testing.assert_close(batch[0].trajectory.videos, batch[1].trajectory.videos)


def _with_old(state: dict[str, Tensor]) -> ToyGenerator:
    """A generator whose trained and old policies both are `state`."""
    from diffusion_rl.lora import set_lora_state

    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, old_policy=True)
    set_lora_state(generator.transformer, state)
    set_lora_state(generator.transformer, state, OLD)
    return generator


def test_the_average_is_the_average_of_the_updates_and_is_what_is_saved(tmp_path: Path) -> None:
    decay, average = 0.6, {}
    optimizer = OptimizerSettings(learning_rate=1e-2, average_decay=decay)
    settings = settings_for(GrpoSettings(), updates=20, optimizer=optimizer)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, average=True)
    for report in finetune(generator, [RED], PROMPTS, settings):
        now = lora_state(generator.transformer)
        # The newest weights' share: all at first, ever less, at last 1 - decay.
        share = max(1 - decay, 9 / (report.step + 8))
        average = {k: (1 - share) * average.get(k, 0 * v) + share * v for k, v in now.items()}
    save_lora(generator, tmp_path)
    fresh = ToyGenerator()
    load_lora(fresh, tmp_path)
    saved = lora_state(fresh.transformer)
    with saved_policy(generator.transformer):
        drawn = sample_videos(generator, PROMPTS, range(len(PROMPTS)))
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value)
        assert name.endswith("lora_A.weight") or not torch.equal(saved[name], now[name])
    assert torch.equal(drawn, sample_videos(fresh, PROMPTS, range(len(PROMPTS))))
    assert not torch.equal(drawn, sample_videos(generator, PROMPTS, range(len(PROMPTS))))


def test_the_learning_rate_falls_in_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def spy(*arguments: object) -> UpdateStatistics:
        optimizer = arguments[-2]
        rates.append(optimizer.param_groups[0]["lr"])
        return update_policy(*arguments)

    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    optimizer = OptimizerSettings(learning_rate=1e-2, final_share=0.2)
    run(settings_for(GrpoSettings(), optimizer=optimizer, updates=5))
    run(settings_for(GrpoSettings(), updates=2))
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002, 0.01, 0.01])


def test_unjudged_videos_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos scored NaN are not among those an update learns from."""
    captured: list[Tensor] = []
    learnt_from = []

    def spy(generator: object, trajectory: Trajectory, *rest: object) -> UpdateStatistics:
        assert not {1, 6} & {places.index(seed) for seed in trajectory.seeds}
        learnt_from.append(len(trajectory.seeds))
        return update_policy(generator, trajectory, *rest)

    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    toy = ToyGenerator()
    drawn = collect(toy, toy.encode_prompts(PROMPTS), settings_for(GrpoSettings()), step=1)
    places = list(drawn.trajectory.seeds)

    def partly(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        score = redness(videos, prompts, fps=fps)
        score[[1, 6]] = math.nan
        captured.append(score)
        return score

    for row in EVERY:
        _, reports = run(settings_for(row, updates=1), Reward("partly", partly))
        assert reports[0].missing_share == 0.25
        assert math.isfinite(reports[0].loss)
        assert reports[0].grad_norm > 0
        assert learnt_from[-1] == 6
        judged = captured[-1][~captured[-1].isnan()]
        assert reports[0].reward == pytest.approx(judged.mean().item())


def test_guards_charge_and_alarm() -> None:
    guards = (GuardSettings(statistic="contrast", weight=2.0, floor=1.0),)
    settings = settings_for(GrpoSettings(), guards=guards, updates=1)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    state = begin(generator, settings)
    state.reference_levels = {"contrast": 10.0}
    (report,) = finetune(generator, [RED], PROMPTS, settings, state)
    assert report.alarms == ("contrast",)
    assert report.penalty == pytest.approx(2.0 * (1 - report.guards["contrast"]))
    assert report.reward == pytest.approx(report.rewards["red"])
    assert state.reference_levels == {"contrast": 10.0}


def test_penalties_are_taken_off_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def spy(score: Tensor, *rest: object) -> Tensor:
        compared.append(score)
        return compare(score, *rest)

    monkeypatch.setattr(diffusion_rl.finetune, "compare", spy)
    nothing = Reward("nothing", lambda videos, prompts, *, fps: torch.zeros(len(videos)))
    guards = (GuardSettings(statistic="contrast", weight=2.0, floor=1.0),)
    settings = settings_for(GrpoSettings(), guards=guards, updates=1)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    state = begin(generator, settings)
    state.reference_levels = {"contrast": 10.0}
    (report,) = finetune(generator, [nothing], PROMPTS, settings, state)
    assert report.penalty > 0
    assert compared[0].max() <= 0
    assert compared[0].mean().item() == pytest.approx(-report.penalty)


def record_comparisons(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, Tensor]]:
    found = []

    def spy(*arguments: object) -> Tensor:
        found.append((arguments, compare(*arguments)))
        return found[-1][1]

    monkeypatch.setattr(diffusion_rl.finetune, "compare", spy)
    return found


def test_rewards_may_be_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record_comparisons(monkeypatch)
    blue = Reward("blue", lambda videos, prompts, *, fps: videos[:, :, 2].mean((1, 2, 3)), 0.5)
    logged = Reward("logged", lambda videos, prompts, *, fps: torch.rand(len(videos)), 0.0)
    guards = (GuardSettings(statistic="contrast", weight=2.0, floor=1.0),)
    row = GrpoSettings(advantage_rewards="separate", advantage_clip=1.5)
    settings = settings_for(row, guards=guards, updates=1)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    state = begin(generator, settings)
    state.reference_levels = {"contrast": 10.0}
    list(finetune(generator, [RED, logged, blue], PROMPTS, settings, state))
    ((score, _, judged, guarded, batch, *_), advantages) = found[0]
    columns = [judged.judgements[name].score for name in ("red", "blue")] + [-guarded.penalty]
    expected = separate_advantages(torch.stack(columns), [1.0, 0.5, 1.0], batch.group, clip=1.5)
    assert torch.equal(advantages, expected)
    assert not torch.allclose(advantages, group_advantages(score, batch.group, clip=1.5))


def test_ddpo_compares_with_what_a_prompt_scored_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record_comparisons(monkeypatch)
    settings = settings_for(DdpoSettings(history_capacity=6, history_min_count=6), updates=4)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    state = begin(generator, settings)
    list(finetune(generator, [RED], PROMPTS[:2], settings, state))
    history = {}
    for (score, _, _, _, batch, *_), advantages in found:
        prompt = batch.trajectory.prompt_index
        expected, history = history_advantages(score, prompt, history, capacity=6, min_count=6)
        assert torch.equal(advantages, expected)
    assert state.history == history
    assert {len(past) for past in history.values()} == {6}
    last = found[-1][0]
    assert not torch.allclose(found[-1][1], group_advantages(last[0], last[4].group))


def test_the_reference_level_is_that_of_the_base() -> None:
    guards = (GuardSettings(statistic="contrast"),)
    settings = settings_for(GrpoSettings(), guards=guards, updates=1)
    levels = []
    for shake in (0.0, 0.5):
        generator = ToyGenerator()
        for parameter in attach_lora(generator.transformer, LORA):
            parameter.data.add_(shake)
        state = begin(generator, settings)
        next(finetune(generator, [RED], PROMPTS, settings, state))
        levels.append(state.reference_levels["contrast"])
    assert levels[0] == levels[1]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda v, p, *, fps: torch.full((len(v),), math.nan), RuntimeError, "NaN for 8 of 8"),
        (lambda v, p, *, fps: torch.zeros(3), ValueError, r"shape \(8,\), got \(3,\)"),
        (lambda v, p, *, fps: 1 / 0, RuntimeError, "reward 'bad' raised ZeroDivisionError"),
    ],
)
def test_a_broken_reward_stops_the_run_and_is_named(
    function: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(settings_for(GrpoSettings()), Reward("bad", function))


def test_the_loop_ends_where_the_settings_say() -> None:
    settings = settings_for(GrpoSettings(), updates=3)
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    state = begin(generator, settings)
    assert [report.step for report in finetune(generator, [RED], PROMPTS, settings, state)] == [
        1,
        2,
        3,
    ]
    assert list(finetune(generator, [RED], PROMPTS, settings, state)) == []


def test_every_prompt_gets_its_turn_and_passes_are_shuffled() -> None:
    drawn = [choose_prompts(5, 2, seed=0, step=step).tolist() for step in range(1, 6)]
    places = [place for pair in drawn for place in pair]
    assert Counter(places[:5]) == Counter(range(5))
    assert Counter(places[5:]) == Counter(range(5))
    assert places[:5] != places[5:]
    assert Counter(choose_prompts(2, 4, seed=0, step=1).tolist()) == {0: 2, 1: 2}
    assert (
        choose_prompts(50, 8, seed=0, step=1).tolist()
        != choose_prompts(50, 8, seed=1, step=1).tolist()
    )


def test_updates_draw_fresh_seeds_far_from_those_of_evaluations() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    embeddings = generator.encode_prompts(PROMPTS)
    batches = [
        collect(generator, embeddings, settings_for(GrpoSettings()), step=step)
        for step in range(1, 9)
    ]
    seeds = [seed for batch in batches for seed in batch.trajectory.seeds]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_TRAINING_SEED
    assert batches[0].group.tolist() == [0] * 4 + [1] * 4
    prompts = batches[0].trajectory.prompt_index
    assert bool((prompts[:4] == prompts[0]).all())
    assert prompts[0] != prompts[4]
    # Which steps explore is drawn too, never the last.
    drawn = {tuple(batch.trajectory.steps[:, 0].tolist()) for batch in batches}
    assert drawn <= {(0, 1), (0, 2), (1, 2)}
    assert len(drawn) > 1
    for batch in batches:
        assert bool((batch.trajectory.steps == batch.trajectory.steps[:, :1]).all())


def test_what_cannot_start_is_refused() -> None:
    generator = ToyGenerator()
    with pytest.raises(
        ValueError, match="generator must carry a LoRA or weights that learn, got none"
    ):
        begin(generator, settings_for(GrpoSettings()))
    attach_lora(generator.transformer, LORA)
    with pytest.raises(ValueError, match="prompts must be at least one text, got none"):
        next(finetune(generator, [RED], [], settings_for(GrpoSettings())))
    with pytest.raises(RuntimeError, match="must have an old policy"):
        next(finetune(generator, [RED], PROMPTS, settings_for(NftSettings())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"missing_limit": 1.0}, r"missing_limit must be in \[0, 1\), got 1.0"),
        (
            {"rollout": dataclasses.replace(ROLLOUT, stochastic_steps=4)},
            "rollout.stochastic_steps must be at most the 3 eligible steps, got 4",
        ),
        (
            {"rollout": dataclasses.replace(ROLLOUT, guidance_scale=2.0, train_guidance=1.0)},
            "rollout.train_guidance must be left out with algorithm 'grpo', got 1.0",
        ),
    ],
)
def test_settings_outside_their_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_for(GrpoSettings(), **changes)
