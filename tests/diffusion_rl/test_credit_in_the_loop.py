"""Credit on its way through the loop: gradients, ratios, every row, and learning from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffusion_rl.finetune
from diffusion_rl.advantages import group_advantages
from diffusion_rl.algorithms import ALGORITHMS, algorithm
from diffusion_rl.checkpoint import read_checkpoint, restore, save_checkpoint, take_snapshot
from diffusion_rl.collect import Batch
from diffusion_rl.configuration import load_config, save_config
from diffusion_rl.credit import Credit, CreditSettings
from diffusion_rl.finetune import (
    FinetuneSettings,
    FinetuneState,
    StepReport,
    begin,
    compare,
    finetune,
    place,
)
from diffusion_rl.guards import GuardReport, GuardSettings
from diffusion_rl.lora import LoraSettings, attach_lora, lora_state, trained_parameters
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer
from diffusion_rl.rewards import Judgement, Reward, add_up_rewards
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.row_kinds import AlgorithmSettings, RecordedSettings
from diffusion_rl.row_settings import SETTINGS, GrpoSettings
from diffusion_rl.sampling import sample_videos
from diffusion_rl.self_check import self_check
from diffusion_rl.step_losses import replay, surrogate_of
from diffusion_rl.transitions import TRANSITIONS, ode
from diffusion_rl.updates import update_policy
from tests.diffusion_rl.test_credit import FAMILIES, build
from tests.toy_gaussian import LORA, ToyGenerator

OPTIONS = RolloutSettings(num_inference_steps=4, micro_batch=4, stochastic_steps=2)
ADVANTAGES = torch.tensor([-1.0, 1.5, -0.5, 0.75])
# raft only follows the best videos: no fault has a place there, and credit other than uniform is
# refused (test_credit).
ROWS = [(name, "video") for name in SETTINGS if name != "raft"]
ROWS += [(name, "position") for name, row in ALGORITHMS.items() if row.learning_steps == "recorded"]


def row_of(name: str, **options: object) -> AlgorithmSettings:
    known = vars(SETTINGS[name]())
    own = {**options, "kl_weight": 0.0, "anchor_weight": 0.0}
    return SETTINGS[name](**{key: value for key, value in own.items() if key in known})


def region_weights() -> Tensor:
    """Videos 0 and 2 focused on one corner of one frame, 1 and 3 not at all."""
    weights = torch.ones(4, 4, 4, 4)
    weights[[0, 2]] = 0.0
    weights[[0, 2], 1, :2, :2] = 16.0
    return weights


def prepare(row: AlgorithmSettings, std: float = 0.1) -> tuple[ToyGenerator, Trajectory]:
    generator = ToyGenerator()
    old = algorithm(row.name).uses_old_policy
    parameters = attach_lora(generator.transformer, LORA, old_policy=old)
    source = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.normal_(std=std, generator=source)
    recorded = isinstance(row, RecordedSettings)
    trajectory = rollout(
        generator,
        generator.encode_prompts(["plain"]),
        torch.zeros(4, dtype=torch.long),
        range(4),
        OPTIONS,
        transition=row.transition_function if recorded else ode,
        stochastic=(0, 2) if recorded else (),
    )
    return generator, dataclasses.replace(trajectory, group=torch.zeros(4, dtype=torch.long))


def learn(row: AlgorithmSettings, credit: Credit) -> tuple[dict[str, Tensor], Tensor]:
    """The adapter after an update at moved weights, and each position's gradient [4 4 4 4]."""
    generator, trajectory = prepare(row)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.02)
    sizes = torch.zeros(4, 4, 4, 4)
    predict = generator.predict

    def record(gradient: Tensor) -> None:
        sizes.add_(gradient.abs().sum(dim=1))

    def spy(*arguments: object) -> Tensor:
        prediction = predict(*arguments)  # type: ignore[arg-type]
        if prediction.requires_grad:
            prediction.register_hook(record)
        return prediction

    generator.predict = spy  # type: ignore[method-assign]
    calm = OptimizerSettings(learning_rate=1e-3, max_grad_norm=1e9)
    optimizer = build_optimizer(trained_parameters(generator.transformer), calm)
    source = torch.Generator().manual_seed(0)
    update_policy(generator, trajectory, credit, row, OPTIONS, optimizer, source)
    return lora_state(generator.transformer), sizes


@pytest.mark.parametrize(("name", "clip"), ROWS)
def test_nothing_outside_the_focus_gets_a_gradient(name: str, clip: str) -> None:
    row = row_of(name, clip_range=0.5, divergence_limit=1.0)
    weights = region_weights()
    _, sizes = learn(row, Credit(ADVANTAGES, weights, clip))
    assert bool((sizes[weights == 0] == 0).all())
    assert bool((sizes[weights > 0] > 0).all())


@pytest.mark.parametrize(("name", "clip"), ROWS)
def test_even_weights_are_uniform_credit_to_the_last_bit(name: str, clip: str) -> None:
    row = row_of(name, clip_range=0.01, inner_steps=1)
    plain, _ = learn(row, Credit(ADVANTAGES, None, clip))
    even, _ = learn(row, Credit(ADVANTAGES, torch.ones(4, 4, 4, 4), clip))
    focused, _ = learn(row, Credit(ADVANTAGES, region_weights(), clip))
    assert all(torch.equal(plain[key], even[key]) for key in plain)
    assert not all(torch.equal(plain[key], focused[key]) for key in plain)


@pytest.mark.parametrize("clip", ["video", "position"])
def test_the_first_gradient_is_the_weighted_policy_gradient(clip: str) -> None:
    """At ratio 1 it is -mean over videos and positions of A * weight * d log_prob, either way."""
    row = GrpoSettings()
    generator, trajectory = prepare(row)
    parameters = trained_parameters(generator.transformer)
    weights = 0.5 + 0.5 * region_weights()
    maps = [replay(generator, trajectory, k, slice(0, 4), OPTIONS).log_prob_map for k in range(2)]
    weighted = sum((ADVANTAGES.view(4, 1, 1, 1) * weights * one).mean() for one in maps) / 2
    expected = torch.autograd.grad(-weighted, parameters)
    found = []
    for k in range(2):
        step = replay(generator, trajectory, k, slice(0, 4), OPTIONS)
        credit = Credit(ADVANTAGES, weights, clip)
        value = surrogate_of(step, trajectory, k, slice(0, 4), credit, row)
        assert bool((value.log_ratios == 0).all())
        found.append(torch.autograd.grad(value.loss, parameters))
    for one, other, known in zip(*found, expected, strict=True):
        torch.testing.assert_close((one + other) / 2, known)


@pytest.mark.parametrize(("clip", "bound"), [("video", 2e-4), ("position", 2e-3)])
def test_clipping_by_loops(clip: str, bound: float) -> None:
    """The surrogate at moved weights, one ratio at a time, with ranges as wide as their means."""
    row = GrpoSettings(clip_range=bound, clip_range_high=2 * bound)
    generator, trajectory = prepare(row)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.5)
    step = replay(generator, trajectory, 1, slice(0, 4), OPTIONS)
    weights = 0.5 + 0.5 * region_weights()
    credit = Credit(ADVANTAGES, weights, clip)
    value = surrogate_of(step, trajectory, 1, slice(0, 4), credit, row)
    change = (step.log_prob_map.detach() - trajectory.log_prob_maps[:, 1]).double()
    losses, left = [], []
    for video, advantage in enumerate(ADVANTAGES.tolist()):
        own, weight = change[video].flatten().tolist(), weights[video].flatten().tolist()
        if clip == "video":
            mean = sum(w * c for w, c in zip(weight, own, strict=True)) / 64
            width = math.sqrt(sum(w * w for w in weight) / 64)
            terms = [(mean, advantage, width)]
        else:
            terms = [(c, advantage * w, 8.0) for w, c in zip(weight, own, strict=True)]
        for log_ratio, gain, width in terms:
            low, high = (1 - bound) ** width, (1 + 2 * bound) ** width
            ratio = math.exp(log_ratio)
            losses.append(-min(ratio * gain, min(max(ratio, low), high) * gain) / len(terms) / 4)
            left.append(not low <= ratio <= high)
    assert value.loss.item() == pytest.approx(sum(losses), rel=1e-5)
    assert value.outside.flatten().tolist() == left
    assert 0 < sum(left) < len(left)


def test_widened_ranges_stop_at_the_same_movement() -> None:
    """Ratios of single positions spread sqrt(P) wider than those of whole latents."""
    row = GrpoSettings()
    generator, trajectory = prepare(row)
    for parameter in trained_parameters(generator.transformer):
        parameter.data.mul_(1.02)
    spreads = []
    for clip in ("video", "position"):
        logs = []
        for k in range(2):
            step = replay(generator, trajectory, k, slice(0, 4), OPTIONS)
            own = Credit(ADVANTAGES, None, clip)
            value = surrogate_of(step, trajectory, k, slice(0, 4), own, row)
            widths = own.widths(64)
            logs.append(value.log_ratios / (1.0 if widths is None else widths))
        spreads.append(torch.cat(logs).square().mean().sqrt().item())
    assert 1 / 2.5 < spreads[1] / spreads[0] < 2.5  # Without the widths it would be about 8.


def test_log_probabilities_of_positions_average_to_those_of_videos() -> None:
    generator, trajectory = prepare(GrpoSettings())
    assert trajectory.log_prob_maps.shape == (4, 2, 4, 4, 4)
    torch.testing.assert_close(trajectory.log_prob_maps.mean((2, 3, 4)), trajectory.log_probs)
    kept = trajectory.keep(torch.tensor([True, False, True, False]))
    assert torch.equal(kept.log_prob_maps, trajectory.log_prob_maps[[0, 2]])


@pytest.mark.parametrize("name", TRANSITIONS)
def test_every_transition_says_it_by_position(name: str) -> None:
    source = torch.Generator().manual_seed(0)
    latent, velocity = (torch.randn(2, 3, 4, 5, 6, generator=source) for _ in range(2))
    levels = (torch.tensor([0.7, 0.6]), torch.tensor([0.5, 0.3]))
    step = TRANSITIONS[name](
        *(latent, velocity, *levels), noise_level=0.6, sigma_max=0.9, generator=source
    )
    assert step.log_prob_map.shape == (2, 4, 5, 6)
    torch.testing.assert_close(step.log_prob_map.mean((1, 2, 3)), step.log_prob)
    if name not in ("ode", "cps"):
        density = torch.distributions.Normal(step.mean, step.std).log_prob(step.next_latent)
        torch.testing.assert_close(step.log_prob_map, density.mean(dim=1))
    if name == "cps":
        square = (step.next_latent - step.mean) ** 2
        torch.testing.assert_close(step.log_prob_map, -square.mean(dim=1))


DARK = 0.29
"""A red pixel below is a fault; the base policy draws one in about half of the videos."""


def judge(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Tensor]:
    """1 for a video without a fault, and the exact pixels of the faults."""
    dark = videos[:, :, 0] < DARK
    return {"score": 1.0 - dark.flatten(1).any(dim=1).float(), "blame": dark.float()}


JUDGE = Reward("dark", judge)
ROLLOUT = RolloutSettings(
    num_inference_steps=4, stochastic_steps=2, prompts_per_update=2, videos_per_prompt=8
)


def settings_for(
    row: AlgorithmSettings, credit: CreditSettings, **more: object
) -> FinetuneSettings:
    settings = FinetuneSettings(
        algorithm=row,
        credit=credit,
        rollout=ROLLOUT,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        updates=2,
    )
    return dataclasses.replace(settings, **more)


def start(settings: FinetuneSettings) -> tuple[ToyGenerator, FinetuneState]:
    generator = ToyGenerator()
    old = algorithm(settings.algorithm.name).uses_old_policy
    attach_lora(generator.transformer, LORA, old_policy=old, seed=settings.seed)
    return generator, begin(generator, settings)


def run(settings: FinetuneSettings, *rewards: Reward) -> tuple[ToyGenerator, list[StepReport]]:
    generator, state = start(settings)
    return generator, list(finetune(generator, rewards or [JUDGE], ["plain"], settings, state))


@pytest.mark.parametrize(("name", "clip"), ROWS)
def test_every_row_runs_with_every_credit(name: str, clip: str) -> None:
    states, shares = [], []
    for credit in ("uniform", "grounded", "random"):
        own = SETTINGS[name](**({"history_min_count": 2} if name == "ddpo" else {}))
        settings = settings_for(own, CreditSettings(name=credit, clip=clip))
        generator, reports = run(settings)
        states.append(lora_state(generator.transformer))
        shares.append(reports[0].focused_share)
        assert reports[0].grad_norm > 0
        area = reports[0].focus_area
        assert math.isnan(area) if credit == "uniform" else 0 < area < 0.2
    assert shares[0] == 0
    assert shares[1] == shares[2] > 0.9
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not all(torch.equal(states[one][key], states[other][key]) for key in states[0])


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_without_mix_grounded_is_uniform_to_the_last_bit(name: str) -> None:
    states = []
    for credit in (CreditSettings(), CreditSettings(name="grounded", mix=0.0)):
        generator, _ = run(settings_for(SETTINGS[name](), credit))
        states.append(lora_state(generator.transformer))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_guards_and_other_rewards_take_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Credit] = []

    def spy(generator: object, trajectory: object, credit: Credit, *rest: object) -> object:
        seen.append(credit)
        return update_policy(generator, trajectory, credit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    bright = Reward("bright", lambda videos, prompts, *, fps: 9 * videos.mean((1, 2, 3, 4)))
    silent = dataclasses.replace(JUDGE, weight=0.0)
    guards = (GuardSettings(statistic="contrast", weight=50.0, floor=1.0),)
    credit = CreditSettings(name="grounded")
    summed, apart = (GrpoSettings(advantage_rewards=how) for how in ("summed", "separate"))
    for row, rewards, more in (
        (summed, (JUDGE,), {}),
        (summed, (JUDGE, bright), {}),
        (apart, (JUDGE, bright), {}),
        (summed, (JUDGE,), {"guards": guards}),
    ):
        run(settings_for(row, credit, updates=1, **more), *rewards)
    alone, *others = (one.focused_share for one in seen)
    assert alone > 0.9
    assert all(0 < other < alone for other in others)
    assert others[0] != others[1]
    for one in seen:
        assert one.weights is not None
        torch.testing.assert_close(one.weights.mean((1, 2, 3)), torch.ones(16))
        assert not bool((one.focused & (one.advantages >= 0)).any())
        # What is left of a disadvantage outside the blame is the part of the others.
        rest = one.weights[one.focused].flatten(1).min(dim=1).values
        assert bool((rest > 1e-3).any()) == (one is not seen[0])
    with pytest.raises(ValueError, match="credit.name must be uniform for rewards that return no"):
        run(settings_for(summed, credit), silent, bright)


def spread_outside(weight: float, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages [4], and the weight [4] of what lies outside a corner that all are blamed for.

    The first row of `scores` [2 4] is the judge's that blames, at weight 1.
    """
    row = GrpoSettings(advantage_rewards="separate")
    generator, trajectory = prepare(row)
    batch = Batch(trajectory, torch.zeros(4, dtype=torch.long), torch.zeros(4).long(), (0, 1, 2, 3))
    blame = torch.zeros(4, 4, 4, 4)
    blame[:, 0, 0, 0] = 1.0
    rewards = [Reward("judge", judge), Reward("other", judge, weight)]
    said = {"judge": Judgement(scores[0], blame), "other": Judgement(scores[1])}
    judged = add_up_rewards(rewards, said, 0.5)
    guarded = GuardReport(torch.zeros(4), {}, {}, ())
    settings = settings_for(row, CreditSettings(name="grounded"))
    state = start(settings)[1]
    advantages = compare(judged.score, rewards, judged, guarded, batch, settings, state)
    credit = place(advantages, generator, rewards, judged, guarded, batch, settings)
    assert credit.weights is not None
    return advantages, credit.weights[:, 3, 3, 3]


def test_rewards_compared_apart_share_a_disadvantage_by_their_weights() -> None:
    """Video 0 is -a in the judge's eyes and -b in the other's: a / (a + weight * b) is focused."""
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [50.0, 90.0, 60.0, 80.0]])
    judge_says, other_says = (group_advantages(one, torch.zeros(4).long()) for one in scores)
    assert judge_says[0] < 0 > other_says[0]
    for weight in (0.25, 4.0):
        _, outside = spread_outside(weight, scores)
        share = judge_says[0] / (judge_says[0] + weight * other_says[0])
        torch.testing.assert_close(outside[0], 1 - share)


def test_rewards_compared_apart_leave_out_what_one_of_them_could_not_judge() -> None:
    """As in their advantages: video 3 has no say in how far the others fall short."""
    scores = torch.tensor([[0.0, 1.0, 2.0, math.nan], [5.0, 6.0, 9.0, 70.0]])
    judge_says, other_says = (group_advantages(one, torch.zeros(3).long()) for one in scores[:, :3])
    advantages, outside = spread_outside(2.0, scores)
    summed = judge_says + 2 * other_says
    torch.testing.assert_close(advantages[:3], summed / summed.std(correction=0))
    share = judge_says[0] / (judge_says[0] + 2 * other_says[0])
    torch.testing.assert_close(outside[0], 1 - share)
    assert advantages[3] == 0
    assert outside[3] == 1


def test_unjudged_videos_take_their_blame_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Credit] = []

    def spy(generator: object, trajectory: Trajectory, credit: Credit, *rest: object) -> object:
        assert len(credit.advantages) == len(trajectory.seeds) == 14
        seen.append(credit)
        return update_policy(generator, trajectory, credit, *rest)  # type: ignore[arg-type]

    def partly(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Tensor]:
        answer = judge(videos, prompts, fps=fps)
        answer["score"][[0, 9]] = math.nan
        whole.append(answer["blame"])
        return answer

    whole: list[Tensor] = []
    monkeypatch.setattr(diffusion_rl.finetune, "update_policy", spy)
    run(
        settings_for(GrpoSettings(), CreditSettings(name="grounded"), updates=1),
        Reward("x", partly),
    )
    kept = [video for video in range(16) if video not in (0, 9)]
    (credit,) = seen
    assert credit.weights is not None
    assert bool(credit.focused.any())
    blame = whole[0][kept]
    for video in credit.focused.nonzero().flatten().tolist():
        # One pixel is one latent position here.
        assert torch.equal(credit.weights[video] > 0, blame[video] > 0)


def test_an_update_without_blame_is_spread_and_the_run_goes_on() -> None:
    """A judge that says nothing of places in one update stops a run only if it is the first."""
    calls = []

    def silent_at(call: int) -> Reward:
        def sometimes(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Tensor]:
            calls.append(call)
            score = {"score": videos.mean((1, 2, 3, 4))}
            return score if len(calls) == call else judge(videos, prompts, fps=fps) | score

        calls.clear()
        return Reward("sometimes", sometimes)

    settings = settings_for(GrpoSettings(), CreditSettings(name="grounded"), updates=3)
    _, reports = run(settings, silent_at(2))
    assert reports[1].grad_norm > 0
    assert [report.focused_share > 0 for report in reports] == [True, False, True]
    with pytest.raises(ValueError, match="credit.name must be uniform for rewards that return no"):
        run(settings, silent_at(1))


@pytest.mark.parametrize("credit", ["grounded", "random"])
@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_a_resumed_run_is_the_uninterrupted_run(name: str, credit: str, tmp_path: Path) -> None:
    settings = settings_for(SETTINGS[name](), CreditSettings(name=credit, mix=0.7), updates=4)
    whole, _ = run(settings)
    first, state = start(settings)
    loop = finetune(first, [JUDGE], ["plain"], settings, state)
    for _ in range(2):
        next(loop)
    save_checkpoint(tmp_path, take_snapshot(first, state))
    loop.close()
    second, again = start(settings)
    restore(second, again, read_checkpoint(tmp_path / "step-000002"))
    list(finetune(second, [JUDGE], ["plain"], settings, again))
    expected, found = (lora_state(one.transformer) for one in (whole, second))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def blame_corners(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Tensor]:
    """Brightness, with a corner of the later frames to blame, at a resolution of its own."""
    blame = torch.zeros(len(videos), videos.shape[1], 5, 7)
    blame[:, 1:, :3, :3] = 0.5
    return {"score": videos.mean((1, 2, 3, 4)), "blame": blame}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_grounded_credit(family: str) -> None:
    generator = build(family)
    attach_lora(generator.transformer, LoraSettings(rank=2))
    settings = FinetuneSettings(
        algorithm=GrpoSettings(clip_range=0.5),
        credit=CreditSettings(name="grounded", clip="position"),
        rollout=RolloutSettings(
            num_inference_steps=3, stochastic_steps=1, prompts_per_update=1, videos_per_prompt=2
        ),
        updates=1,
    )
    prompts = ["a red circle moves left"]
    (report,) = finetune(generator, [Reward("bright", blame_corners)], prompts, settings)
    assert report.focused_share > 0.1
    assert 0 < report.focus_area < 1
    assert report.grad_norm > 0


def updates_to_halve(credit: str, clip: str, seed: int, most: int = 24) -> int:
    """Updates after which half of the base policy's faults are gone; `most` if they never are."""
    settings = settings_for(
        GrpoSettings(clip_range=0.02),
        CreditSettings(name=credit, clip=clip),
        updates=most,
        seed=seed,
    )
    generator, state = start(settings)

    def faults() -> float:
        videos = sample_videos(generator, ["plain"] * 128, range(128), num_inference_steps=4)
        return 1 - judge(videos, [], fps=1.0)["score"].mean().item()

    before = faults()
    assert 0.3 < before < 0.7
    for report in finetune(generator, [JUDGE], ["plain"], settings, state):
        if faults() <= before / 2:
            return report.step
    return most


@pytest.mark.parametrize(("clip", "seed"), [("video", 0), ("position", 1)])
def test_credit_that_knows_the_place_needs_fewer_videos(clip: str, seed: int) -> None:
    """On faults whose pixels are known: grounded is faster than uniform, a random place is not."""
    uniform, grounded, random = (
        updates_to_halve(credit, clip, seed) for credit in ("uniform", "grounded", "random")
    )
    assert grounded <= 0.75 * uniform
    assert random >= uniform


def test_the_self_check_knows_ratios_of_positions() -> None:
    class Noisy(ToyGenerator):
        def predict(self, *arguments: object) -> Tensor:
            prediction = super().predict(*arguments)  # type: ignore[arg-type]
            return prediction + 1e-3 if torch.is_grad_enabled() else prediction

    found = []
    for clip in ("video", "position"):
        generator = Noisy()
        attach_lora(generator.transformer, LORA)
        known = (generator, generator.encode_prompts(["plain"]))
        found.append(
            self_check(*known, GrpoSettings(clip_range=0.1), ROLLOUT, clip).ratio_deviation
        )
        with pytest.raises(ValueError, match="clip_range must be above the numerical noise"):
            self_check(*known, GrpoSettings(clip_range=1e-6), ROLLOUT, clip)
    # Of a thousand positions the worst deviates by more, but not by the eight times of one.
    assert 0 < found[0] < found[1] < 5 * found[0]


SMALLEST = """
generator: {path: some/folder, height: 16, width: 32, num_frames: 5, fps: 8}
rewards: [{name: red, target: "module:name"}]
prompts: prompts.txt
output: runs/x
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["credit.name=ground"],
            "^credit.name must be one of uniform, grounded, random, got ground",
        ),
        (["credit.mix=0.5"], "^credit.mix must be left out with name 'uniform', got 0.5"),
        (["credit={name: grounded, mix: 2}"], r"^credit.mix must be in \[0, 1\], got 2.0"),
        (["credit={name: random, mix: -1}"], r"^credit.mix must be in \[0, 1\], got -1.0"),
        (["credit={name: random, mix: all}"], "^credit.mix must be a number, got 'all'"),
        (["credit.clip=pixel"], "^credit.clip must be one of video, position, got pixel"),
        (["credit.clap=video"], "^credit.clap must be a known key.*did you mean clip?"),
        (["credit=grounded"], "^credit must be a mapping, got 'grounded'"),
        (["credit.name=1"], "^credit.name must be a text, got 1"),
        (
            ["algorithm.name=nft", "credit.clip=position"],
            "^credit.clip must be left out with algorithm 'nft', got position",
        ),
        (
            ["algorithm.name=awm", "credit={name: grounded, clip: position}"],
            "^credit.clip must be left out with algorithm 'awm', got position",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(SMALLEST)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "small.yaml", overrides)


@pytest.mark.parametrize(
    "written", ["{name: grounded, mix: 0.5, clip: position}", "{name: random}", "{clip: position}"]
)
def test_credit_survives_saving(written: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALLEST)
    settings = load_config(tmp_path / "small.yaml", [f"credit={written}"])
    assert settings.finetune_settings().credit == settings.credit != CreditSettings()
    save_config(settings, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == settings
