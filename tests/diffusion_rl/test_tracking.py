"""Metrics that survive a crash, videos that other programs can open."""

import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import accelerate.tracking
import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_rl.tracking import (
    AccelerateTracker,
    MetricsFile,
    flatten,
    read_metrics,
    write_video,
)


@dataclasses.dataclass(frozen=True)
class Report:
    step: int
    loss: float = 0.5
    rewards: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"cac": 0.25})
    alarms: tuple[str, ...] = ()


def test_mappings_become_names_with_a_slash() -> None:
    assert flatten(Report(1)) == {"step": 1, "loss": 0.5, "rewards/cac": 0.25, "alarms": ()}


def test_lines_are_appended_and_strict_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "run")
    metrics.write(Report(1, alarms=("motion",)))
    metrics.write(Report(2, loss=math.nan))
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [0.5, None]
    assert json.loads(lines[0])["alarms"] == ["motion"]
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2]


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.write(Report(step))
    resumed = MetricsFile(tmp_path, step=2)
    assert [line["step"] for line in read_metrics(resumed.path)] == [1, 2]
    resumed.write(Report(3))
    assert [line["step"] for line in read_metrics(resumed.path)] == [1, 2, 3]
    assert read_metrics(MetricsFile(tmp_path).path) == []


def test_a_last_line_cut_off_is_dropped_and_an_inner_one_refused(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.write(Report(1))
    whole = metrics.path.read_text()
    metrics.path.write_text(whole + '{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(metrics.path)] == [1]
    metrics.path.write_text('{"step": 0, "lo\n' + whole)
    with pytest.raises(ValueError, match="must hold one JSON object a line, got .* in line 1"):
        read_metrics(metrics.path)
    assert read_metrics(tmp_path / "nothing.jsonl") == []


class Recorder(accelerate.tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.logged: list = []

    @property
    def tracker(self) -> object:
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.logged.append(values)

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append("finished")


class Pictures(Recorder):
    def log_images(self, values: dict, step: int | None = None, **options: object) -> None:
        self.logged.append(("pictures", step, values, options))


def test_accelerate_trackers_get_the_numbers(tmp_path: Path) -> None:
    recorder = Recorder()
    tracker = AccelerateTracker([recorder], tmp_path, "run", {"seed": 0})
    tracker.write(Report(3))
    tracker.close()
    assert recorder.logged == [
        {"seed": 0},
        (3, {"step": 3, "loss": 0.5, "rewards/cac": 0.25}),
        "finished",
    ]


def test_videos_go_to_those_who_take_them_and_frames_to_those_who_take_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of a tracker is only asked for its `Video`, as wandb's and trackio's have it."""
    package = types.ModuleType("wandb")
    package.Video = lambda path: ("video", path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    numbers, pictures, board, videos = (
        Recorder(),
        Pictures("pictures"),
        Pictures("tensorboard"),
        Pictures("wandb"),
    )
    tracker = AccelerateTracker([numbers, pictures, board, videos], tmp_path, "run", {})
    video = gradient_video().repeat(4, 1, 1, 1)
    tracker.write_videos(7, {"samples/a": (tmp_path / "a.mp4", video)})
    assert numbers.logged == [{}]
    _, step, values, options = pictures.logged[1]
    assert (step, options) == (7, {})
    assert values["samples/a"].shape == (8, 16, 24, 3)
    assert values["samples/a"].dtype == np.uint8
    expected = (video[[0, -1]] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(values["samples/a"][[0, -1]], expected)
    assert board.logged[1][3] == {"dataformats": "NHWC"}
    assert videos.logged[1:] == [(7, {"samples/a": ("video", str(tmp_path / "a.mp4"))})]
    tracker.write_videos(8, {"samples/a": (tmp_path / "a.webp", video)})
    assert videos.logged[2][:2] == ("pictures", 8)


def test_tensorboard_holds_numbers_and_frames(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = AccelerateTracker(["tensorboard"], tmp_path, "run", {"seed": "0"})
    tracker.write(Report(3))
    tracker.write_videos(3, {"samples/a": (tmp_path / "a.mp4", gradient_video())})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0, "scalars": 0}).Reload()
    assert [(one.step, one.value) for one in events.Scalars("rewards/cac")] == [(3, 0.25)]
    pictures = events.Images("samples/a")
    assert [(one.step, one.width, one.height) for one in pictures][0][0] == 3


def test_a_tracker_without_its_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="trackers must be installed, got 'aim'; install"):
        AccelerateTracker(["aim"], tmp_path, "run", {})


def gradient_video(height: int = 16, width: int = 24) -> torch.Tensor:
    across = torch.linspace(0, 1, width).expand(height, width)
    return torch.stack([torch.stack([across * f / 5, across, 1 - across]) for f in range(5)])


@pytest.mark.parametrize("size", [(16, 24), (15, 23)])
def test_mp4_keeps_size_rate_and_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    video = gradient_video(*size)
    path = write_video(tmp_path / "deep" / "clip.mp4", video, 8.0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 8.0
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5
    decoded = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255
    assert decoded.shape == video.shape
    assert (decoded - video).abs().mean() < 0.02


def test_webp_is_lossless_and_may_be_enlarged(tmp_path: Path) -> None:
    video = gradient_video()
    path = write_video(tmp_path / "clip.webp", video, 8.0, scale=2)
    with Image.open(path) as image:
        image.load()  # The duration is known then.
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (48, 32), 125)
        image.seek(3)
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    expected = (video[3] * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(pixels[::2, ::2], expected)


@pytest.mark.parametrize(
    ("name", "video", "fps", "message"),
    [
        ("a.gif", torch.zeros(2, 3, 4, 4), 8.0, "path must end in one of .mp4, .webp, got .*a.gif"),
        ("a.mp4", torch.zeros(2, 4, 4, 3), 8.0, r"video must be \[F 3 H W\], got shape"),
        ("a.mp4", torch.zeros(2, 3, 4, 4), 0.0, "fps must be above 0, got 0.0"),
    ],
)
def test_bad_videos_are_refused(
    tmp_path: Path, name: str, video: torch.Tensor, fps: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, video, fps)
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 4, 4), 8.0, scale=0)
