"""Which steps explore in an update, and from which noise its groups start."""

from __future__ import annotations

import pytest
import torch

from diffusion_rl.collect import choose_steps, collect, update_source
from diffusion_rl.lora import attach_lora
from diffusion_rl.progress import FinetuneSettings
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import GrpoSettings, MixGrpoSettings, NftSettings
from diffusion_rl.transitions import cps, flow_sde, ode
from tests.toy_gaussian import LORA, ToyGenerator


def windows(row: AlgorithmSettings, updates: int, size: int = 3, seed: int = 0) -> list[list[int]]:
    settings = FinetuneSettings(
        algorithm=row,
        rollout=RolloutSettings(num_inference_steps=9, stochastic_steps=size),
        seed=seed,
    )
    return [
        choose_steps(settings, step, update_source(seed, step), range(8))
        for step in range(1, updates + 1)
    ]


def test_a_sliding_window_covers_every_eligible_step_and_begins_again() -> None:
    found = windows(MixGrpoSettings(updates_per_window=2), updates=14)
    starts = [0, 1, 2, 3, 4, 5, 0]
    assert found == [list(range(start, start + 3)) for start in starts for _ in range(2)]


def test_a_long_stride_does_not_leave_out_the_last_steps() -> None:
    found = windows(MixGrpoSettings(updates_per_window=1, window_stride=2), updates=5)
    assert [window[0] for window in found] == [0, 2, 4, 5, 0]


@pytest.mark.parametrize("window", ["sliding", "random"])
@pytest.mark.parametrize("size", range(1, 9))
def test_a_window_neither_shrinks_nor_empties(window: str, size: int) -> None:
    row = MixGrpoSettings(window=window, updates_per_window=1)
    for found in windows(row, updates=30, size=size):
        assert len(found) == size
        assert found == list(range(found[0], found[0] + size))
        assert 0 <= found[0] <= 8 - size


def test_a_random_window_stays_for_its_updates_and_reaches_every_place() -> None:
    row = MixGrpoSettings(window="random", updates_per_window=3)
    found = windows(row, updates=300)
    starts = [window[0] for window in found]
    assert starts[::3] == starts[1::3] == starts[2::3]
    assert set(starts) == set(range(6))
    assert starts != [window[0] for window in windows(row, updates=300, seed=1)]


def test_other_rows_scatter_their_steps() -> None:
    found = windows(GrpoSettings(), updates=40)
    assert all(len(set(steps)) == 3 and steps == sorted(steps) for steps in found)
    assert {step for steps in found for step in steps} == set(range(8))
    assert any(steps[2] - steps[0] > 2 for steps in found)


@pytest.mark.parametrize("shared_noise", [False, True])
def test_every_group_may_draw_steps_of_its_own(shared_noise: bool) -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    embeddings = generator.encode_prompts(["plain"])
    found = []
    for step in range(1, 5):
        settings = FinetuneSettings(
            algorithm=GrpoSettings(),
            rollout=RolloutSettings(
                **{"num_inference_steps": 6, "stochastic_steps": 2, "steps_of": "group"},
                **{"prompts_per_update": 3, "videos_per_prompt": 2, "shared_noise": shared_noise},
            ),
        )
        drawn = collect(generator, embeddings, settings, step=step).trajectory
        assert torch.equal(drawn.steps[:, ::2], drawn.steps[:, 1::2])
        found += drawn.steps.T.tolist()
    assert all(first < second < 5 for first, second in found)
    assert len({tuple(one) for one in found}) > 5
    assert {place for one in found for place in one} == set(range(5))


def test_a_window_is_that_of_all_groups() -> None:
    message = "rollout.steps_of must be update with algorithm 'mix_grpo', got group"
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(algorithm=MixGrpoSettings(), rollout=RolloutSettings(steps_of="group"))
    with pytest.raises(ValueError, match="steps_of must be one of update, group, got 'prompt'"):
        RolloutSettings(steps_of="prompt")


@pytest.mark.parametrize(
    ("row", "expected"),
    [(GrpoSettings(), flow_sde), (GrpoSettings(transition="cps"), cps), (NftSettings(), ode)],
)
def test_the_rollout_takes_the_rows_transition(row: AlgorithmSettings, expected: object) -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, old_policy=True)
    settings = FinetuneSettings(
        algorithm=row,
        rollout=RolloutSettings(num_inference_steps=4, prompts_per_update=1, videos_per_prompt=2),
    )
    batch = collect(generator, generator.encode_prompts(["plain"]), settings, step=1)
    assert batch.trajectory.transition is expected
    assert len(batch.trajectory.steps) == (0 if expected is ode else 3)


def test_a_group_that_shares_its_noise_starts_as_one_and_ends_as_many() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    embeddings = generator.encode_prompts(["plain"])

    def draw(shared_noise: bool) -> torch.Tensor:
        options = RolloutSettings(
            num_inference_steps=4,
            prompts_per_update=2,
            videos_per_prompt=3,
            stochastic_steps=1,
            eligible_steps=1,
            shared_noise=shared_noise,
        )
        settings = FinetuneSettings(algorithm=GrpoSettings(), rollout=options)
        return collect(generator, embeddings, settings, step=1).trajectory

    shared, own = draw(True), draw(False)
    # The two groups show the same prompt, and still do not share.
    assert len(set(shared.seeds)) == 2
    assert len(set(own.seeds)) == 6
    start = shared.latents[0]
    assert torch.equal(start[0], start[2])
    assert not torch.equal(start[0], start[3])
    assert len({video.sum().item() for video in shared.videos}) == 6
    assert not torch.equal(own.latents[0, 0], own.latents[0, 2])
