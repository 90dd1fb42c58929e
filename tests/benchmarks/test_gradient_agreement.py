"""The agreement of gradients, against vectors whose common part is known."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.algorithms import run_settings
from benchmarks.gradient_agreement import (
    agreement,
    gradient_of,
    imply_outcomes,
    judge_update,
    main,
    own_credit,
    trace_of,
    with_outcomes,
)
from diffusion_rl.configuration import build, to_tree
from diffusion_rl.finetune import measure_base
from diffusion_rl.launch import prepare
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.transitions import TransitionFunction, cps, ddim, flow_sde
from tests.toy_gaussian import ToyGenerator

SMALL = ["rollout.prompts_per_update=1", "rollout.videos_per_prompt=4"]


def draw(take: TransitionFunction, settings: RolloutSettings, videos: int) -> Trajectory:
    """Videos of the exact Gaussian, exploring in all steps but the last."""
    generator = ToyGenerator()
    prompt = generator.encode_prompts(["bright"])
    places = (torch.zeros(videos, dtype=torch.long), range(videos))
    steps = range(settings.num_inference_steps - 1)
    return rollout(generator, prompt, *places, settings, transition=take, stochastic=steps)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_the_share_that_gradients_have_in_common_is_found(share: float) -> None:
    source = torch.Generator().manual_seed(0)
    common, *noise = torch.randn((41, 100_000), generator=source)
    found = [share**0.5 * common + (1 - share) ** 0.5 * one for one in noise]
    mean, low, high = agreement(found)
    assert mean == pytest.approx(share, abs=0.01)
    assert low <= mean <= high
    # Averages of n such gradients agree as the module says.
    means = [sum(found[start : start + 4]) / 4 for start in range(0, 40, 4)]
    assert agreement(means)[0] == pytest.approx(4 * share / (1 + 3 * share), abs=0.01)


def test_two_rows_agree_by_what_both_have_in_common() -> None:
    source = torch.Generator().manual_seed(0)
    common, *noise = torch.randn((41, 100_000), generator=source)
    good = [0.6 * common + 0.8 * one for one in noise[:20]]
    bad = [0.2 * common + 0.96**0.5 * one for one in noise[20:]]
    assert agreement(good, bad)[0] == pytest.approx(0.6 * 0.2, abs=0.01)
    # What two rows make of the same videos does not count: here it is all that they share.
    assert agreement(noise[:20], noise[:20])[0] == pytest.approx(0, abs=0.01)


def test_the_implied_outcome_is_the_mean_of_all_on_the_way_to_the_video() -> None:
    # Ancestral sampling reverses a Markov chain of noising, in which a latent is shrunk and gets
    # noise: what lies between a latent and the data is then Gaussian, with a mean of two products.
    settings = RolloutSettings(num_inference_steps=6, stochastic_steps=5, noise_level=1.0)
    drawn = draw(ddim, settings, videos=8)
    implied = imply_outcomes(drawn, settings)
    for index, at in enumerate(drawn.steps):
        high, low = drawn.sigmas[at : at + 2].double()
        shrunk = (1 - high) / (1 - low)
        added = high**2 - shrunk**2 * low**2
        prior, data = low**2, drawn.final_latent.double()
        # N(low_latent; (1 - low) data, low^2) times N(latent; shrunk low_latent, added).
        precision = 1 / prior + shrunk**2 / added
        mean = (1 - low) * data / prior + shrunk * drawn.latents[index].double() / added
        assert torch.allclose(implied[index].double(), mean / precision, rtol=0, atol=1e-5)


def factor_of(noise_level: float) -> float:
    """By which implied outcomes of Flow-SDE fit the drawn ones, away from the highest levels."""
    settings = RolloutSettings(
        num_inference_steps=100, stochastic_steps=99, noise_level=noise_level
    )
    drawn = draw(flow_sde, settings, videos=500)
    late = [*trace_of(drawn, imply_outcomes(drawn, settings)).values()][20:]
    return sum(one.products for one in late) / sum(one.implied_squares for one in late)


def test_videos_tell_of_noise_what_the_implied_outcome_says() -> None:
    # With this noise level Flow-SDE reverses the noising of flow matching; its steps are small, not
    # infinitely so.
    assert 0.9 < factor_of(2**0.5) < 1.1
    assert factor_of(0.7) > 1.2
    # Where every step replaces all noise, nothing of the first ones' is left.
    settings = RolloutSettings(num_inference_steps=20, stochastic_steps=19, noise_level=1.0)
    drawn = draw(cps, settings, videos=200)
    first = trace_of(drawn, imply_outcomes(drawn, settings))[0]
    assert first.products**2 / (first.squares * first.implied_squares) < 1e-3


def test_drawn_outcomes_change_nothing(tmp_path: Path) -> None:
    options = Namespace(output=tmp_path, updates=3)
    tree = {**to_tree(run_settings(options, "grpo", seed=0)), "evaluation": None}
    tree["rollout"].update(prompts_per_update=1, videos_per_prompt=4)
    run = prepare(build(tree))
    measure_base(run.generator, run.embeddings, run.settings.finetune_settings(), run.state)
    update = judge_update(run, 1)
    drawn = update.batch.trajectory
    again = with_outcomes(run, update, drawn.next_latents)
    assert torch.equal(again.batch.trajectory.log_probs, drawn.log_probs)
    assert torch.equal(again.batch.trajectory.log_prob_maps, drawn.log_prob_maps)
    # A ratio's logarithm is linear in the outcome: the gradient of a mean is the mean of gradients.
    implied = imply_outcomes(drawn, run.settings.rollout)
    between = with_outcomes(run, update, (drawn.next_latents + implied) / 2)
    found = [
        gradient_of(run, one, own_credit(run, one)).double()
        for one in (update, with_outcomes(run, update, implied), between)
    ]
    assert found[0].norm() > 0
    assert torch.allclose((found[0] + found[1]) / 2, found[2], rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], found[2], rtol=0, atol=1e-5)


def test_rows_are_measured_with_both_outcomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--rows", "grpo", "nft", "--updates", "3", "--implied"]
    main([*rows, "--output", str(tmp_path), "--set", *SMALL])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0] for line in lines]
    assert names[:4] == ["| row", "| grpo", "| grpo, implied", "| nft"]
    pairs = ["| grpo; grpo, implied", "| grpo; nft", "| grpo, implied; nft"]
    assert names[4:9] == ["| rows", *pairs, "| grpo: step"]
    assert sorted(set(names[9:]) & {f"| {at}" for at in range(7)}) == names[9:]
    counts = []
    for line in lines[9:]:
        count, told, factor = line.strip("| ").split(" | ")[1:]
        counts.append(int(count))
        assert 0 <= float(told) <= 1
        assert math.isfinite(float(factor))
    assert sum(counts) == 3 * 3


def test_two_gradients_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "2"])
    assert "--updates must be at least 3, got 2" in capsys.readouterr().err
