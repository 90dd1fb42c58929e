"""A stopped evaluation goes on where it was, and only where nothing has changed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_rl.evaluation import gather
from diffusion_rl.evaluation_parts import (
    EvaluationParts,
    EvaluationTask,
    fingerprint,
)
from diffusion_rl.vbench import VBenchFolder

PROMPTS = ["a", "a", "b", "b", "c", "c"]


class Report:
    def to_dict(self) -> dict[str, float]:
        return {"score": 0.5}


def judge(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict:
    score = videos.mean((1, 2, 3, 4))
    return {"score": torch.where(score > 0.9, torch.nan, score), "reports": [Report()] * len(score)}


TASK = EvaluationTask(
    prompts=PROMPTS,
    seeds=range(6),
    measures={"judge": judge},
    fps=8.0,
    batch_size=2,
    keep=[0, 3, 5],
)


class Sampler:
    """Videos that tell their seed; raises at a seed as Ctrl-C does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.drawn: list[int] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.stop_at in seeds:
            raise KeyboardInterrupt
        self.drawn += seeds
        levels = torch.tensor([0.19 * seed for seed in seeds])
        return levels.view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 16, 16)


def run(folder: Path, sampler: Sampler, **identity: str) -> list:
    parts = EvaluationParts(folder, identity)
    return list(parts.measure("base", sampler, TASK))


def test_the_batches_before_the_stop_are_not_drawn_again(tmp_path: Path) -> None:
    whole = gather(batch for batch, _ in run(tmp_path / "whole", Sampler()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Sampler(stop_at=4))
    again = Sampler()
    batches = run(tmp_path / "cut", again)
    assert again.drawn == [4, 5]
    joined = gather(batch for batch, _ in batches)
    assert joined.prompts == whole.prompts == tuple(PROMPTS)
    assert joined.seeds == whole.seeds
    torch.testing.assert_close(
        joined.values["judge"], whole.values["judge"], rtol=0, atol=0, equal_nan=True
    )
    assert joined.values["judge"].isnan().sum() == 1
    assert torch.equal(joined.videos, whole.videos)
    assert joined.videos[:, 0, 0, 0, 0].tolist() == [round(0.19 * n * 255) for n in TASK.keep]
    assert list(joined.reports["judge"][:4]) == [{"score": 0.5}] * 4
    assert all(seconds >= 0 for _, seconds in batches)


def test_another_evaluation_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, Sampler(), lora="one")
    same, other = Sampler(), Sampler()
    run(tmp_path, same, lora="one")
    run(tmp_path, other, lora="two")
    assert (same.drawn, other.drawn) == ([], list(range(6)))


def test_a_damaged_batch_is_drawn_again(tmp_path: Path) -> None:
    run(tmp_path, Sampler())
    (damaged,) = tmp_path.glob("parts/base-000002.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-7])
    again = Sampler()
    run(tmp_path, again)
    assert again.drawn == [2, 3]
    parts = EvaluationParts(tmp_path, {})
    parts.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_no_evaluation_made_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "parts"
    own.mkdir()
    EvaluationParts(tmp_path, {}).close()  # An empty one may be one that was stopped at once.
    own.mkdir()
    (own / "wing.step").write_text("of another program")
    with pytest.raises(ValueError, match=rf"no folder parts but that of an .*, got {own} without"):
        EvaluationParts(tmp_path, {})
    assert (own / "wing.step").read_text() == "of another program"


def test_a_removal_that_is_cut_off_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, Sampler())
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda folder, ignore_errors: None)
        EvaluationParts(tmp_path, {}).close()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["identity"]
    other = Sampler()
    run(tmp_path, other, lora="two")
    assert other.drawn == list(range(6))


def test_a_missing_video_for_vbench_is_drawn_again(tmp_path: Path) -> None:
    parts = EvaluationParts(tmp_path / "out", {})
    list(parts.measure("base", Sampler(), TASK, VBenchFolder(tmp_path / "vbench", "base")))
    (tmp_path / "vbench" / "base" / "b-1.mp4").unlink()
    again = Sampler()
    list(parts.measure("base", again, TASK, VBenchFolder(tmp_path / "vbench", "base")))
    assert again.drawn == [2, 3]
    assert len(list((tmp_path / "vbench" / "base").iterdir())) == 6


def test_reports_of_any_kind_are_kept(tmp_path: Path) -> None:
    said = [Report(), "could not decode", None, {"a": [1]}, {1, 2}, "fine"]

    def odd(videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict:
        first = int(round(videos[0, 0, 0, 0, 0].item() / 0.19))
        return {"score": videos.mean((1, 2, 3, 4)), "reports": said[first : first + len(videos)]}

    task = replace(TASK, measures={"odd": odd})
    list(EvaluationParts(tmp_path, {}).measure("base", Sampler(), task))
    again = EvaluationParts(tmp_path, {})
    kept = [again.load("base", first)[0].reports["odd"] for first in (0, 2, 4)]
    assert kept == [[{"score": 0.5}, "could not decode"], [None, {"a": [1]}], ["{1, 2}", "fine"]]


def test_the_fingerprint_follows_weights_and_settings_alone(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert fingerprint(tmp_path) == before
    os.utime(tmp_path / "a.safetensors", ns=(1, 1))
    assert fingerprint(tmp_path) != before
