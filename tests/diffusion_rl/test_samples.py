"""Samples of a run: the same noise each time, the judge's boxes on them, and the run untouched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_rl.clips import Clip, draw_clip, judged_clip, tint_blame
from diffusion_rl.configuration import RunSettings, build
from diffusion_rl.launch import CHECKPOINTS, prepare, show_samples, train
from diffusion_rl.policies import policies_of, reference_policy, trained_parameters
from diffusion_rl.rewards import Judgement
from diffusion_rl.run_folder import check_same_run
from diffusion_rl.samples import INDEX, draw_sample, step_folder
from diffusion_rl.sampling import sample_videos
from tests.tiny_wan import save_tiny_wan

SAMPLES: dict[str, Any] = {
    "prompts": ["a red circle", "the blue square"],
    "every": 2,
    "seeds": [3, 5],
    "format": "webp",
}
BOX = [0.25, 0.25, 0.75, 0.75]


def boxed(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict:
    finding = {"type": "vanish", "window": [0.0, 0.3], "boxes": [{"time": 0.1, "box": BOX}]}
    score = videos.mean((1, 2, 3, 4)) + 0.01 * torch.rand(len(prompts))  # It draws.
    missing = torch.tensor([text.startswith("the") for text in prompts]) & (len(prompts) == 4)
    score = torch.where(missing, torch.nan, score)
    return {
        "score": score,
        "reports": [{"findings": [finding], "windows": [[0, 0.4]]}] * len(score),
    }


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def settings_of(folder: Path, pipeline: Path, **more: Any) -> RunSettings:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a green circle\n")
    size = {"height": 16, "width": 16, "num_frames": 5, "fps": 8, "max_sequence_length": 12}
    tree = {
        "generator": {"path": str(pipeline), **size},
        "lora": {"rank": 2},
        "rollout": {
            "num_inference_steps": 3,
            "stochastic_steps": 1,
            "prompts_per_update": 1,
            "videos_per_prompt": 2,
        },
        "optimizer": {"learning_rate": 0.2, "average_decay": 0.5},
        "rewards": [{"name": "boxed", "target": f"{__name__}:boxed"}],
        "prompts": str(folder / "prompts.txt"),
        "updates": 4,
        "output": str(folder / "run"),
        **more,
    }
    return build(tree)


def weights(run: Any) -> dict[str, Tensor]:
    return policies_of(run.generator.transformer).state()


def test_samples_are_drawn_when_it_is_their_turn_and_change_nothing(
    pipeline: Path, tmp_path: Path
) -> None:
    plain = prepare(settings_of(tmp_path / "plain", pipeline))
    torch.manual_seed(0)
    list(train(plain))
    run = prepare(
        settings_of(tmp_path / "shown", pipeline, samples=SAMPLES), keep_text_encoder=True
    )
    torch.manual_seed(0)
    list(train(run))
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(plain).items())
    assert not (tmp_path / "plain" / "run" / "samples").exists()

    folders = sorted(path.name for path in (run.output / "samples").iterdir())
    assert folders == ["step-000002", "step-000004"]
    files = ["00-seed3.webp", "00-seed5.webp", "01-seed3.webp", "01-seed5.webp"]
    for folder in folders:
        found = sorted(path.name for path in (run.output / "samples" / folder).iterdir())
        assert found == [*files, INDEX]
    last = step_folder(run.output, 4)
    entries = json.loads((last / INDEX).read_text(), parse_constant=pytest.fail)
    assert [entry["file"] for entry in entries] == files
    assert [entry["prompt"] for entry in entries] == [p for p in SAMPLES["prompts"] for _ in "ab"]
    assert [entry["seed"] for entry in entries] == [3, 5, 3, 5]
    assert [entry["scores"]["boxed"] is None for entry in entries] == [False, False, True, True]

    # What is saved drew them: the average, from the seed alone.
    policies = policies_of(run.generator.transformer)
    with policies.use("average"):
        (expected,) = sample_videos(run.generator, ["the blue square"], [5], num_inference_steps=3)
    report = boxed(expected[None], ["x"], fps=8.0)["reports"][0]
    drawn = draw_clip(judged_clip(expected, 8.0, report))
    picture = Image.open(last / "01-seed5.webp")
    assert picture.size == (drawn.shape[3], drawn.shape[2])
    pixels = torch.tensor(np.asarray(picture.convert("RGB"))) / 255
    torch.testing.assert_close(pixels.permute(2, 0, 1), drawn[0], rtol=0, atol=0.6 / 255)
    other = Image.open(step_folder(run.output, 2) / "01-seed5.webp")
    assert not np.array_equal(np.asarray(other.convert("RGB")), np.asarray(picture.convert("RGB")))


def test_the_policy_that_is_saved_draws(pipeline: Path, tmp_path: Path) -> None:
    run = prepare(settings_of(tmp_path, pipeline, samples=SAMPLES), keep_text_encoder=True)
    for parameter in trained_parameters(run.generator.transformer):
        torch.nn.init.normal_(parameter, std=0.5)  # The average stays where it began: at no change.
    show_samples(run, 2, [])
    written = np.asarray(Image.open(step_folder(run.output, 2) / "01-seed5.webp").convert("RGB"))
    text = SAMPLES["prompts"][1]
    trained = sample_videos(run.generator, [text], [5], num_inference_steps=3)[0]
    with reference_policy(run.generator.transformer):
        expected = sample_videos(run.generator, [text], [5], num_inference_steps=3)[0]
    for video, same in ((expected, True), (trained, False)):
        report = boxed(video[None], ["x"], fps=8.0)["reports"][0]
        drawn = draw_clip(judged_clip(video, 8.0, report))[0].permute(1, 2, 0)
        close = torch.allclose(torch.tensor(written) / 255, drawn, rtol=0, atol=0.6 / 255)
        assert close is same


def test_a_run_may_go_on_with_other_samples(pipeline: Path, tmp_path: Path) -> None:
    run = prepare(settings_of(tmp_path, pipeline, updates=1))
    list(train(run))
    assert (run.output / CHECKPOINTS).is_dir()
    later = settings_of(tmp_path, pipeline, updates=2, samples={**SAMPLES, "format": "mp4"})
    check_same_run(later)
    list(train(prepare(later)))
    assert len(list(step_folder(run.output, 2).glob("*.mp4"))) == 4


def test_boxes_come_before_blame_and_blame_is_tinted() -> None:
    video = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    score = torch.tensor([0.5])
    blame = torch.zeros(1, 4, 2, 2)
    blame[0, 1, 0, 1] = 1.0
    report = {"findings": [{"type": "x", "window": [0, 1], "boxes": [{"time": 0, "box": BOX}]}]}
    plain = draw_clip(Clip(video, 8.0))
    with_box = draw_sample(video, 8.0, {"a": Judgement(score, blame, [report])}, 0)
    assert torch.equal(with_box, draw_clip(judged_clip(video, 8.0, report)))
    assert not torch.equal(with_box, plain)
    tinted = draw_sample(
        video, 8.0, {"a": Judgement(score), "b": Judgement(score, blame, ["?"])}, 0
    )
    changed = (tinted != plain).any(1)
    height = tinted.shape[2] - 14
    assert torch.equal(changed.any((1, 2)), torch.tensor([False, True, False, False]))
    assert bool(changed[1, : height // 2, height // 2 : height].all())
    assert changed[1].sum() == (height // 2) ** 2
    failed = {"a": Judgement(score, None, [{"error": "no answer"}])}
    assert torch.equal(draw_sample(video, 8.0, failed, 0), plain)
    failed["b"] = Judgement(score, blame)
    assert torch.equal(draw_sample(video, 8.0, failed, 0), tinted)
    failed["c"] = Judgement(score, None, [report])
    assert torch.equal(draw_sample(video, 8.0, failed, 0), with_box)
    assert torch.equal(draw_sample(video, 8.0, {"a": Judgement(score)}, 0), plain)
    half = tint_blame(torch.zeros(1, 3, 2, 2), torch.full((1, 1, 1), 0.5))
    torch.testing.assert_close(half[0, :, 0, 0], 0.5 * 0.6 * torch.tensor([0.90, 0.16, 0.22]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "samples.prompts must be at least one text"),
        ({"prompts": [" "]}, "samples.prompts must be at least one text"),
        ({"every": 0}, "samples.every must be at least 1, got 0"),
        ({"seeds": []}, r"samples.seeds must be at least one in \[0, 2\^31\)"),
        ({"seeds": [-1]}, r"samples.seeds must be at least one in .* got \[-1\]"),
        ({"format": "gif"}, "samples.format must be one of mp4, webp, got gif"),
        ({"evry": 1}, "samples.evry must be a known key.*did you mean every"),
    ],
)
def test_samples_that_cannot_be_are_refused(
    change: dict[str, Any], message: str, pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, pipeline, samples={**SAMPLES, **change})
