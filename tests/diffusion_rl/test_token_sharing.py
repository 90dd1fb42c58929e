"""Processes that share out the tokens of a video do what one does, alone or in several teams."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rl import processes
from diffusion_rl.configuration import RunSettings, build
from diffusion_rl.full_policies import REFERENCE
from diffusion_rl.generators.execution import share_tokens
from diffusion_rl.generators.settings import ContextParallelSettings, ExecutionSettings
from diffusion_rl.launch import prepare, train
from diffusion_rl.policies import policies_of
from diffusion_rl.preflight import check_processes
from diffusion_rl.reward_contract import Judgement
from diffusion_rl.rewards import gather_judgement
from diffusion_rl.samples import SampleSettings
from diffusion_rl.tracking import flatten
from tests.diffusion_rl.test_execution import build as build_tiny
from tests.several import run_on
from tests.tiny_wan import save_tiny_wan

CALLS = {"videos": 0}

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="diffusers would share tokens over the accelerators"
)


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> dict[str, Tensor]:
    """A reward that finds fault with the right half of each frame."""
    CALLS["videos"] += len(videos)
    blame = torch.zeros(*videos.shape[:2], 2, 2)
    blame[..., 1] = 1
    return {"score": videos[:, :, 0].mean((1, 2, 3)), "blame": blame}


ROWS: dict[str, dict[str, Any]] = {
    "grpo": {
        "algorithm": {"name": "grpo", "kl_weight": 0.1, "inner_steps": 2},
        "credit": {"name": "grounded", "mix": 0.5},
        "rollout": {"stochastic_steps": 1},
        "lora": {"rank": 2, "alpha": 4},
    },
    "nft": {"algorithm": {"name": "nft", "kl_weight": 0.1}, "full": {}},
}


def settings_for(folder: Path, row: str) -> RunSettings:
    (folder / "prompts.txt").write_text("a red circle\nthe blue square\n")
    size = {"height": 16, "width": 16, "num_frames": 5, "fps": 8.0, "max_sequence_length": 12}
    reward = {"name": "red", "target": f"{__name__}:redness"}
    rollout = {"num_inference_steps": 3, "prompts_per_update": 2, "videos_per_prompt": 3}
    return build(
        {
            **ROWS[row],
            "generator": {"path": str(save_tiny_wan(folder / "wan")), **size},
            "rollout": {**rollout, "micro_batch": 2, **ROWS[row].get("rollout", {})},
            "optimizer": {"learning_rate": 3e-4},
            "rewards": [reward],
            "evaluation": {"rewards": [{**reward, "name": "held"}], "every": 2},
            "guards": [{"statistic": "contrast"}],
            "prompts": str(folder / "prompts.txt"),
            "updates": 2,
            "output": str(folder / "run"),
        }
    )


def with_tokens_shared(settings: RunSettings) -> RunSettings:
    execution = ExecutionSettings(context_parallel=ContextParallelSettings(ulysses=2))
    generator = dataclasses.replace(settings.generator, execution=execution)
    return dataclasses.replace(settings, generator=generator)


def learnt(settings: RunSettings) -> tuple[dict[str, Tensor], list[dict[str, Any]], int]:
    """What a run leaves: weights, reports but for times, and the videos that were judged here."""
    CALLS["videos"] = 0
    run = prepare(settings)
    reports = [flatten(report) for report in train(run)]
    kept = [
        {key: one[key] for key in one if "seconds" not in key and isinstance(one[key], int | float)}
        for one in reports
    ]
    return policies_of(run.generator.transformer).state(), kept, CALLS["videos"]


@pytest.mark.parametrize("row", list(ROWS))
def test_teams_learn_what_one_process_learns(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings_for(tmp_path, row)
    whole = dataclasses.replace(own, output=str(tmp_path / "whole"))
    weights, reports, judged = learnt(whole)
    base = policies_of(prepare(whole, restart=True).generator.transformer).state(REFERENCE)
    assert row == "grpo" or max((weights[one] - base[one]).abs().max() for one in base) > 3e-4
    # Diffusers counts accelerators even where there are none.
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for count in (2, 4):
        output = str(tmp_path / f"run-{count}")
        shared = with_tokens_shared(dataclasses.replace(own, output=output))
        group = run_on(count, partial(learnt, shared))
        for number, found in enumerate(group):
            assert isinstance(found, tuple), found
            torch.testing.assert_close(found[0], weights, rtol=0, atol=2e-5)
            for one, other in zip(found[1], reports, strict=True):
                assert one == pytest.approx(other, abs=1e-3, nan_ok=True), number
        # Every video is judged once, by the first of its team.
        assert [found[2] for found in group] == [judged * 2 // count, 0] * (count // 2)


def test_processes_of_a_team_hear_its_first() -> None:
    def act() -> tuple[int, int, bool, Any, list[float], list[float], int]:
        processes.form_teams(2)
        rank = processes.rank()
        rows = torch.tensor([processes.team()])
        gathered = processes.gather_rows(torch.tensor([10.0 + rank]), rows, 2).tolist()
        heard, added = processes.from_leader(f"said by {rank}"), processes.add_up([1.0 + rank])
        own = Judgement(torch.zeros(1), reports=[rank], unanswered=1)
        judged = gather_judgement(own, torch.zeros(1, 2, 3, 4, 4), rows, 2)
        assert judged.reports == [0, 2]
        place = (processes.team(), processes.team_count(), processes.leads())
        processes.form_teams(1)
        assert processes.team_count() == 4
        return *place, heard, gathered, added, judged.unanswered

    first, second, third, fourth = run_on(4, act)
    assert first == (0, 2, True, "said by 0", [10.0, 12.0], [4.0], 2)
    assert second == (0, 2, False, "said by 0", [10.0, 12.0], [4.0], 2)
    assert third == (1, 2, True, "said by 2", [10.0, 12.0], [4.0], 2)
    assert fourth == (1, 2, False, "said by 2", [10.0, 12.0], [4.0], 2)

    def refused() -> None:
        processes.gather_objects("here")  # The first must not be gone before all have met.
        processes.form_teams(2)

    for said in run_on(3, refused):
        assert "teams must be of equal size, got 3 processes for teams of 2" in str(said)


def test_what_teams_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = with_tokens_shared(settings_for(tmp_path, "nft"))
    check_processes(own)
    with pytest.raises(ValueError, match="context_parallel must divide the processes that run"):
        prepare(own)
    shown = SampleSettings(every=1, prompts=("a cup",))
    with pytest.raises(ValueError, match="samples must be left out with generator.execution.con"):
        check_processes(dataclasses.replace(own, samples=shown))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    refused = pytest.raises(ValueError, match="context_parallel must be left out where the launch")
    with refused:
        check_processes(own)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with refused:
        check_processes(own)


@pytest.mark.parametrize("family", ["wan", "ti2v"])
def test_parts_of_a_gradient_sum_up_to_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)

    def passed(shared: bool) -> tuple[Tensor, dict[str, Tensor]]:
        generator = build_tiny(family)
        text = generator.encode_prompts(["a red circle", "the blue square"])
        transformer = generator.transformer.requires_grad_(True)
        if shared:
            share_tokens(transformer, ContextParallelSettings(ulysses=2))
        source = torch.Generator().manual_seed(0)
        latent = torch.randn(2, *generator.latent_shape, generator=source)
        made = generator.velocity(
            latent, torch.tensor([0.9, 0.4]), text.conditional, text.conditional_extras
        )
        made.square().mean().backward()
        weights = dict(transformer.named_parameters())
        for one in weights.values():
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        processes.add_up_gradients(list(weights.values()))
        return made.detach(), {name: one.grad for name, one in weights.items()}

    expected = passed(False)
    for found in run_on(2, partial(passed, True)):
        assert isinstance(found, tuple), found
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
