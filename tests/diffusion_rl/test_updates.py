"""One update: its gradient by hand, its KL term, its batching, its failures."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion_rl.updates
from diffusion_rl import step_losses
from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.credit import Credit
from diffusion_rl.lora import (
    attach_lora,
    lora_state,
    old_policy,
    reference_policy,
    trained_parameters,
)
from diffusion_rl.noising import draw_sigmas
from diffusion_rl.optimizers import SKIPPED, OptimizerSettings, build_optimizer, take_step
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.row_kinds import AlgorithmSettings, RecordedSettings
from diffusion_rl.row_settings import (
    AwmSettings,
    DanceGrpoSettings,
    DdpoSettings,
    DppoSettings,
    GrpoGuardSettings,
    GrpoSettings,
    NftSettings,
    OnlineDpoSettings,
    RaftSettings,
)
from diffusion_rl.step_losses import replay, surrogate_of
from diffusion_rl.transitions import ode
from diffusion_rl.updates import NotFiniteError, UpdateStatistics, update_policy
from tests.toy_gaussian import LORA, ToyGenerator

ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -1.5, 0.75, 2.0])
CALM = OptimizerSettings(learning_rate=1e-3, max_grad_norm=1e9)


def prepare(
    algorithm: AlgorithmSettings,
    options: RolloutSettings,
    std: float = 0.0,
    stochastic: tuple[int, ...] | Tensor = (0, 2),
) -> tuple[ToyGenerator, Trajectory]:
    """A generator (its adapter shaken by `std`) and six videos it drew."""
    generator = ToyGenerator()
    parameters = attach_lora(
        generator.transformer, LORA, old_policy=ALGORITHMS[algorithm.name].uses_old_policy
    )
    source = torch.Generator().manual_seed(3)
    for parameter in parameters if std else []:
        parameter.data.normal_(std=std, generator=source)
    embeddings = generator.encode_prompts(["plain", "bright"])
    recorded = isinstance(algorithm, RecordedSettings)
    trajectory = rollout(
        generator,
        embeddings,
        torch.arange(6) % 2,
        range(6),
        options,
        transition=algorithm.transition_function if recorded else ode,
        stochastic=stochastic if recorded else (),
    )
    return generator, dataclasses.replace(trajectory, group=torch.tensor([0, 0, 0, 1, 1, 1]))


def run(
    generator: ToyGenerator,
    trajectory: Trajectory,
    algorithm: AlgorithmSettings,
    options: RolloutSettings,
    advantages: Tensor = ADVANTAGES,
    calm: OptimizerSettings = CALM,
) -> UpdateStatistics:
    optimizer = build_optimizer(trained_parameters(generator.transformer), calm)
    source = torch.Generator().manual_seed(0)
    credit = Credit(advantages)
    return update_policy(generator, trajectory, credit, algorithm, options, optimizer, source)


def distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((before[name] - after[name]).abs().max().item() for name in before)


OPTIONS = RolloutSettings(num_inference_steps=4, micro_batch=6)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize(
    ("algorithm", "passes", "values"),
    [
        (RaftSettings(inner_steps=2, noise_levels=2), 1, {1: 1.5, 4: 1.5}),
        (RaftSettings(inner_steps=2, noise_levels=2), 1, {0: 1.5}),
        (RaftSettings(inner_steps=2, noise_levels=2), 1, {}),
        (OnlineDpoSettings(inner_steps=2, noise_levels=2), 3, {0: 1.0, 2: -1.0}),
        (OnlineDpoSettings(inner_steps=2, noise_levels=2), 3, {5: 1.0, 4: -1.0}),
        (OnlineDpoSettings(inner_steps=2, noise_levels=2), 3, {}),
    ],
)
def test_videos_that_teach_nothing_are_not_passed(
    size: int,
    algorithm: RaftSettings | OnlineDpoSettings,
    passes: int,
    values: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are those of passing all of them, at a part of the cost."""
    options = RolloutSettings(num_inference_steps=4, micro_batch=size)
    advantages = torch.zeros(6)
    for place, value in values.items():
        advantages[place] = value
    results, passed = [], []
    for idle in (True, False):
        row = dataclasses.replace(ALGORITHMS[algorithm.name], idle_at_zero=idle)
        monkeypatch.setitem(ALGORITHMS, algorithm.name, row)
        generator, trajectory = prepare(algorithm, options, std=0.1)
        count = []
        predict = generator.predict

        def counting(latent: Tensor, *more: Any, of: Any = predict, into: Any = count) -> Tensor:
            into.append(len(latent))
            return of(latent, *more)

        monkeypatch.setattr(generator, "predict", counting)
        statistics = run(generator, trajectory, algorithm, options, advantages)
        results.append((statistics, lora_state(generator.transformer)))
        passed.append(sum(count))
    # What no loss compares is passed once at most: its gain is not asked for.
    own, steps = max(1, len(values)), algorithm.inner_steps * algorithm.noise_levels
    assert passed == [passes * own * steps, ((passes - 1) * own + 6) * steps]
    (one, found), (other, expected) = results
    assert one.loss == pytest.approx(other.loss)
    assert one.grad_norm == pytest.approx(other.grad_norm)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_all_videos_are_passed_where_they_are_held_near_the_reference() -> None:
    algorithm = RaftSettings(kl_weight=0.1)
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    nothing = run(generator, trajectory, algorithm, OPTIONS, torch.zeros(6))
    assert nothing.kl > 0
    assert nothing.grad_norm > 0


def test_the_first_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 the surrogate's gradient is -mean of advantage x gradient of log_prob."""
    algorithm = GrpoSettings()
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    parameters = trained_parameters(generator.transformer)
    log_probs = torch.stack(
        [replay(generator, trajectory, k, slice(0, 6), OPTIONS).log_prob for k in range(2)], 1
    )
    expected = torch.autograd.grad(-(ADVANTAGES[:, None] * log_probs).mean(), parameters)
    found = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            found.append([group.grad.clone() for group in self.param_groups[0]["params"]])

    recorder = Recorder([{"params": parameters, "max_grad_norm": 1e9}], lr=1.0)
    statistics = update_policy(
        generator, trajectory, Credit(ADVANTAGES), algorithm, OPTIONS, recorder, torch.Generator()
    )
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, other)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected))
    assert statistics.grad_norm == pytest.approx(norm)
    assert statistics.ratio_deviation == 0.0
    assert statistics.clip_fraction == 0.0
    assert statistics.loss == pytest.approx(-ADVANTAGES.mean().item())


@pytest.mark.parametrize(
    "algorithm",
    [
        *(GrpoSettings(kl_weight=0.1), NftSettings(inner_steps=2)),
        *(GrpoGuardSettings(), DppoSettings(), AwmSettings(inner_steps=2, noise_levels=2)),
    ],
)
def test_the_micro_batch_changes_no_gradient(algorithm: AlgorithmSettings) -> None:
    results = []
    for size in (6, 4, 1):
        options = RolloutSettings(num_inference_steps=4, micro_batch=size)
        generator, trajectory = prepare(algorithm, options, std=0.1)
        run(generator, trajectory, algorithm, options)
        results.append(lora_state(generator.transformer))
    for other in results[1:]:
        for name in other:
            torch.testing.assert_close(other[name], results[0][name])


@pytest.mark.parametrize(
    "algorithm",
    [GrpoSettings(kl_weight=0.1, inner_steps=2), AwmSettings(inner_steps=2, noise_levels=2)],
)
def test_the_update_may_take_smaller_or_larger_passes_than_the_rollout(
    algorithm: AlgorithmSettings,
) -> None:
    results, sizes = [], []
    for size in (None, 1, 2, 5):
        options = RolloutSettings(num_inference_steps=4, micro_batch=3, update_micro_batch=size)
        generator, trajectory = prepare(algorithm, options, std=0.1)
        predict, seen = generator.predict, []

        def spy(latent: Tensor, *rest: object, predict=predict, seen=seen) -> Tensor:
            seen.append(len(latent))
            return predict(latent, *rest)

        generator.predict = spy
        statistics = run(generator, trajectory, algorithm, options)
        sizes.append(max(seen))
        results.append((lora_state(generator.transformer), statistics.grad_norm))
    # Three of the six videos in each optimiser step of grpo, all of them in each of awm.
    assert sizes == [3, 1, 2, 3 if algorithm.name == "grpo" else 5]
    for state, norm in results[1:]:
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        for name in state:
            torch.testing.assert_close(state[name], results[0][0][name])


def test_inner_steps_split_the_recorded_videos() -> None:
    options = RolloutSettings(num_inference_steps=4, micro_batch=2)
    steps = []
    for inner in (1, 2, 3, 99):
        algorithm = GrpoSettings(inner_steps=inner)
        generator, trajectory = prepare(algorithm, options)
        optimizer = build_optimizer(trained_parameters(generator.transformer), CALM)
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        optimizer.register_step_post_hook(counted)
        statistics = update_policy(
            generator,
            trajectory,
            Credit(ADVANTAGES),
            algorithm,
            options,
            optimizer,
            torch.Generator(),
        )
        steps.append(count)
        # The videos of later optimiser steps were drawn before the earlier ones.
        assert (statistics.ratio_deviation > 0) == (count > 1)
    assert steps == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "algorithm",
    [
        *(GrpoSettings(kl_weight=1.0), NftSettings(kl_weight=1000.0, inner_steps=1)),
        *(DanceGrpoSettings(kl_weight=1.0), DdpoSettings(kl_weight=1.0)),
        *(GrpoSettings(kl_weight=1.0, transition="cps"), AwmSettings(kl_weight=1.0)),
    ],
)
def test_the_kl_term_pulls_towards_the_reference(algorithm: AlgorithmSettings) -> None:
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.3)

    def gap() -> float:
        latent, sigma = generator.initial_latents(range(6)), torch.tensor(0.5)
        with torch.no_grad():
            now = generator.predict(latent, sigma, trajectory.embeddings, 1.0)
            with reference_policy(generator.transformer):
                base = generator.predict(latent, sigma, trajectory.embeddings, 1.0)
        return (now - base).square().mean().item()

    before = gap()
    statistics = run(generator, trajectory, algorithm, OPTIONS, torch.zeros(6))
    assert statistics.kl > 0
    assert gap() < before


@pytest.mark.parametrize("weighting", ["none", "longcat", "flash"])
@pytest.mark.parametrize("own_steps", [False, True])
def test_the_kl_term_is_weighted_by_the_square(weighting: str, own_steps: bool) -> None:
    """By loops over videos and steps, each at the noise levels of its own; `kl` is as it is."""
    algorithm = GrpoSettings(kl_weight=0.5, step_weighting=weighting)
    stochastic = torch.tensor([[0, 1, 0, 2, 1, 0], [2, 2, 1, 3, 3, 1]])
    changes = {"stochastic": stochastic} if own_steps else {}
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.3, **changes)
    sigmas, plain, weighted = trajectory.sigmas.tolist(), [], []
    for index in range(2):
        step = replay(generator, trajectory, index, slice(0, 6), OPTIONS)
        with torch.no_grad(), reference_policy(generator.transformer):
            base = replay(generator, trajectory, index, slice(0, 6), OPTIONS)
        for video, place in enumerate(trajectory.steps[index].tolist()):
            sigma, dt, std = (
                sigmas[place],
                sigmas[place] - sigmas[place + 1],
                step.std[video].item(),
            )
            weight = {
                "none": 1.0,
                "longcat": math.sqrt(sigma / (1 - min(sigma, sigmas[1])) / dt),
                "flash": 1 / (dt / std + std * (1 - sigma) / (2 * sigma)),
            }[weighting]
            moved = (step.mean[video] - base.mean[video]).square().mean().item() / (2 * std**2)
            plain.append(moved)
            weighted.append(weight**2 * moved)
    statistics = run(generator, trajectory, algorithm, OPTIONS, torch.zeros(6))
    assert statistics.kl == pytest.approx(sum(plain) / 12, rel=1e-4)
    assert statistics.loss == pytest.approx(0.5 * sum(weighted) / 12, rel=1e-4)


@pytest.mark.parametrize("algorithm", [GrpoSettings(), NftSettings(kl_weight=0.0, inner_steps=1)])
def test_without_advantage_and_kl_nothing_moves(algorithm: AlgorithmSettings) -> None:
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    if algorithm.name == "nft":
        # With the old policy at the trained one, good and bad pull alike.
        from diffusion_rl.policies import update_old_policy

        update_old_policy(generator.transformer, 0.0)
    before = copy.deepcopy(lora_state(generator.transformer))
    statistics = run(generator, trajectory, algorithm, OPTIONS, torch.zeros(6))
    assert statistics.kl == 0.0
    assert statistics.grad_norm == pytest.approx(0.0, abs=1e-6)
    if algorithm.name == "grpo":
        assert distance(before, lora_state(generator.transformer)) == 0.0


def test_forward_process_statistics_have_no_ratio() -> None:
    algorithm = NftSettings()
    generator, trajectory = prepare(algorithm, OPTIONS)
    statistics = run(generator, trajectory, algorithm, OPTIONS)
    assert math.isnan(statistics.ratio_deviation)
    assert math.isnan(statistics.clip_fraction)
    assert statistics.grad_norm > 0


def test_awm_compares_with_the_policy_before_the_update() -> None:
    """Ratio 1 exactly at its first optimiser step, not after; its anchor is the old policy."""
    for inner, deviates in ((1, False), (3, True)):
        algorithm = AwmSettings(inner_steps=inner, noise_levels=2, anchor_weight=0.0, kl_weight=0.0)
        generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
        statistics = run(generator, trajectory, algorithm, OPTIONS)
        assert (statistics.ratio_deviation > 0) == deviates
        assert statistics.clip_fraction == 0.0
    found = []
    for inner in (1, 2):
        algorithm = AwmSettings(inner_steps=inner, noise_levels=2, weighting="t", clip_range=1e-6)
        generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
        found.append(run(generator, trajectory, algorithm, OPTIONS).clip_fraction)
    # In the second of two steps every ratio has moved; half of those would learn no more.
    assert found == [0.0, pytest.approx(0.5)]


def test_awm_sees_each_video_at_several_noise_levels_in_one_step() -> None:
    algorithm = AwmSettings(noise_levels=3, anchor_weight=0.0, kl_weight=0.0)
    generator, trajectory = prepare(algorithm, OPTIONS)
    asked = []
    predict = generator.predict

    def spy(latent: Tensor, sigma: Tensor, *rest: object) -> Tensor:
        asked.append(sigma)
        return predict(latent, sigma, *rest)

    generator.predict = spy
    run(generator, trajectory, algorithm, OPTIONS)
    assert len(asked) == 3
    assert len(torch.stack(asked).unique()) == 18


def test_the_anchor_pulls_towards_the_old_policy() -> None:
    algorithm = AwmSettings(anchor_weight=10.0, kl_weight=0.0)
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.3)

    def gap() -> float:
        latent, sigma = generator.initial_latents(range(6)), torch.tensor(0.5)
        with torch.no_grad():
            now = generator.predict(latent, sigma, trajectory.embeddings, 1.0)
            with old_policy(generator.transformer):
                old = generator.predict(latent, sigma, trajectory.embeddings, 1.0)
        return (now - old).square().mean().item()

    before = gap()
    run(generator, trajectory, algorithm, OPTIONS, torch.zeros(6))
    assert gap() < before


@pytest.mark.parametrize("kind", [GrpoGuardSettings, DppoSettings])
def test_rows_that_watch_the_means_see_them_move(kind: type) -> None:
    """Against their formulas, from a replay with weights that have moved."""
    algorithm = kind()
    generator, trajectory = prepare(algorithm, OPTIONS, std=0.1)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.1)
    part = slice(0, 6)
    step = replay(generator, trajectory, 1, part, OPTIONS)
    value = surrogate_of(step, trajectory, 1, part, Credit(ADVANTAGES), algorithm)
    plain = (step.log_prob - trajectory.log_probs[:, 1]).detach()
    std = step.std.flatten()
    shift = (step.mean - trajectory.means[1]).square().flatten(1).mean(1).detach()
    assert shift.min() > 0
    if kind is DppoSettings:
        far = shift / (2 * std**2) >= algorithm.divergence_limit
        assert torch.equal(value.log_ratios[:, 0], plain)
        assert torch.equal(value.outside[:, 0], far & (plain * ADVANTAGES > 0))
        return
    torch.testing.assert_close(value.log_ratios[:, 0], (plain + shift / (2 * std**2)) * std)
    duration = trajectory.sigmas[2] - trajectory.sigmas[3]
    ratio = value.log_ratios[:, 0].exp()
    worst = torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(1 - 2e-6, 1 + 2e-6))
    torch.testing.assert_close(value.loss.detach(), worst.mean() / duration)


def test_final_latents_are_noised_as_flow_matching_does() -> None:
    """latent = (1 - sigma) * data + sigma * noise, the same for every policy asked."""
    algorithm = NftSettings(inner_steps=1)
    generator, trajectory = prepare(algorithm, OPTIONS)
    asked = []
    predict = generator.predict

    def spy(latent: Tensor, sigma: Tensor, *rest: object) -> Tensor:
        asked.append((latent, sigma))
        return predict(latent, sigma, *rest)

    generator.predict = spy
    run(generator, trajectory, algorithm, OPTIONS)
    source = torch.Generator().manual_seed(0)
    data = trajectory.final_latent
    noise = torch.randn(data.shape, generator=source)
    sigma = draw_sigmas(trajectory.sigmas, 6, source)
    level = sigma.view(6, 1, 1, 1, 1)
    assert len(asked) == 3  # Old, reference and trained.
    for latent, levels in asked:
        assert torch.equal(levels, sigma)
        torch.testing.assert_close(latent, data + level * (noise - data))


def test_noise_levels_follow_the_schedule_and_fill_it_evenly() -> None:
    schedule = torch.tensor([1.0, 0.9, 0.6, 0.0])
    sigmas = draw_sigmas(schedule, 300, torch.Generator().manual_seed(0))
    assert bool(((sigmas > 0) & (sigmas <= 1)).all())
    # A third of the levels in each third of the schedule, whatever its width.
    assert int((sigmas > 0.9).sum()) == 100
    assert int(((sigmas > 0.6) & (sigmas <= 0.9)).sum()) == 100
    assert not torch.equal(sigmas, sigmas.sort().values)
    with_one = draw_sigmas(torch.tensor([1.0, 0.0]), 1, torch.Generator().manual_seed(0))
    assert 0 < with_one.item() <= 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm() -> None:
    algorithm = GrpoSettings()
    generator, trajectory = prepare(algorithm, OPTIONS)
    before = lora_state(generator.transformer)
    broken, strict = torch.full((6,), math.nan), dataclasses.replace(CALM, skip_limit=0)
    message = "must be finite, got 2 of 2 losses that are not, and a gradient of norm nan, 1 opt"
    with pytest.raises(NotFiniteError, match=message) as raised:
        run(generator, trajectory, algorithm, OPTIONS, broken, strict)
    assert raised.value.inputs.credit.advantages is broken
    assert distance(before, lora_state(generator.transformer)) == 0.0
    assert all(p.grad is None for p in trained_parameters(generator.transformer))


def run_three_steps(
    algorithm: AlgorithmSettings, what: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[UpdateStatistics, dict[str, Tensor], torch.optim.Optimizer]:
    """An update of which the second optimiser step is broken, or left out by hand."""
    options = RolloutSettings(num_inference_steps=4, micro_batch=2)
    generator, trajectory = prepare(algorithm, options, std=0.1)
    optimizer = build_optimizer(trained_parameters(generator.transformer), CALM)
    number = 0

    def losses(generator: ToyGenerator, inputs: step_losses.StepInputs) -> Iterator:
        nonlocal number
        number += 1
        for terms in step_losses.step_losses(generator, inputs):
            extra = 0.0
            if number == 2 and what == "loss":  # With a gradient that is finite.
                extra = math.inf
            elif number == 2 and what == "gradient":
                extra = torch.sqrt(trained_parameters(generator.transformer)[0].sum() * 0)
            yield terms._replace(loss=terms.loss + extra)

    def take(optimizer: torch.optim.Optimizer, split: object) -> float:
        if number == 2 and what == "left out":
            optimizer.zero_grad()
            return 0.0
        return take_step(optimizer)

    monkeypatch.setattr(diffusion_rl.updates, "step_losses", losses)
    monkeypatch.setattr(diffusion_rl.updates, "take_step", take)
    statistics = update_policy(
        *(generator, trajectory, Credit(ADVANTAGES), algorithm, options, optimizer),
        torch.Generator().manual_seed(0),
    )
    return statistics, lora_state(generator.transformer), optimizer


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("algorithm", [GrpoSettings(inner_steps=3), NftSettings(inner_steps=3)])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    algorithm: AlgorithmSettings, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three: weights and optimiser end where the other two alone take them."""
    statistics, weights, optimizer = run_three_steps(algorithm, what, monkeypatch)
    assert statistics.skipped_steps == 1
    assert math.isfinite(statistics.loss)
    assert math.isfinite(statistics.grad_norm)
    assert optimizer.param_groups[0][SKIPPED] == 0  # The third was taken.
    without, expected, other = run_three_steps(algorithm, "left out", monkeypatch)
    assert without.skipped_steps == 0
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    states = (one.state_dict()["state"].values() for one in (optimizer, other))
    for one, another in zip(*states, strict=True):
        assert one["step"] == another["step"] == 2
        assert torch.equal(one["exp_avg_sq"], another["exp_avg_sq"])


def test_an_update_without_a_step_has_no_numbers_and_stops_past_the_limit() -> None:
    generator, trajectory = prepare(GrpoSettings(), OPTIONS)
    parameters = trained_parameters(generator.transformer)
    optimizer = build_optimizer(parameters, dataclasses.replace(CALM, skip_limit=2))
    parts = (GrpoSettings(), OPTIONS, optimizer, torch.Generator())
    broken = Credit(torch.full((6,), math.inf))

    def update(credit: Credit) -> UpdateStatistics:
        return update_policy(generator, trajectory, credit, *parts)

    for _ in range(2):
        statistics = update(broken)
        assert statistics.skipped_steps == 1
        assert math.isnan(statistics.loss)
        assert math.isnan(statistics.grad_norm)
    update(Credit(ADVANTAGES))  # Not in a row any more.
    for _ in range(2):
        update(broken)
    with pytest.raises(NotFiniteError, match="norm nan, 3 optimiser steps in a row; go on from"):
        update(broken)


def test_the_gradient_is_limited() -> None:
    algorithm = GrpoSettings()
    generator, trajectory = prepare(algorithm, OPTIONS)
    parameters = trained_parameters(generator.transformer)
    optimizer = torch.optim.SGD([{"params": parameters, "max_grad_norm": 1e-3}], lr=1.0)
    before = lora_state(generator.transformer)
    statistics = update_policy(
        generator, trajectory, Credit(ADVANTAGES), algorithm, OPTIONS, optimizer, torch.Generator()
    )
    after = lora_state(generator.transformer)
    moved = math.sqrt(sum((after[n] - before[n]).square().sum().item() for n in before))
    assert statistics.grad_norm > 1e-3
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_the_old_policys_decay_grows_to_its_limit() -> None:
    settings = NftSettings(old_decay_rate=0.1, old_decay_limit=0.25)
    assert [settings.old_decay(n) for n in (1, 2, 3, 100)] == [0.1, 0.2, 0.25, 0.25]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GrpoSettings, {"clip_range": 1.1}, r"clip_range must be in \(0, 1\], got 1.1"),
        (GrpoSettings, {"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
        (GrpoSettings, {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        (
            GrpoSettings,
            {"advantage_std": "all"},
            "advantage_std must be one of group, batch, largest",
        ),
        (GrpoSettings, {"advantage_clip": 0.0}, "advantage_clip must be above 0, got 0.0"),
        (GrpoSettings, {"name": "nft"}, "name must be the row that GrpoSettings belongs to"),
        (NftSettings, {"beta": 0.0}, "beta must be above 0, got 0.0"),
        (NftSettings, {"old_decay_rate": -1.0}, "old_decay_rate must be at least 0, got -1.0"),
        (NftSettings, {"old_decay_limit": 1.0}, r"old_decay_limit must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
