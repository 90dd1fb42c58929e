"""The command line on a video file, with a tiny real judge."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.frames import JudgeSettings, ScanSettings
from cac_reward.judges.local import LocalJudge
from cac_reward.report import AnomalyReport
from cac_reward.video import Video
from tests.tiny_judge import build_tiny_judge

CALL = '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.25, 1.00]]}}\n</tool_call>'
FINDINGS = (
    '{"findings": [{"type": "vanish", "window": [0.25, 1.00], "boxes": [], "severity": 2, '
    '"why": "gone"}]}'
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_judge(tmp_path_factory.mktemp("judge"))
    scan = ScanSettings(pixels=1024)
    JudgeSettings(wording="brief", domain="toy_world", scan=scan).save(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    Video.from_float(torch.rand(40, 3, 48, 64), 24.0).save(path)
    return path


@pytest.fixture
def eloquent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the random weights write what a trained judge would, and never find a clip clean."""

    def choose(self: LocalJudge, conversations: list, *, choices: tuple, **_: object) -> object:
        rows = [-9.0, 0.0, -9.0] if len(choices) == 3 else [-2.0, -0.5]
        return torch.tensor([rows] * len(conversations))

    def write(self: LocalJudge, conversations: list, *, prefix: str, **_: object) -> list[str]:
        return [CALL if prefix == "<tool_call>" else FINDINGS] * len(conversations)

    monkeypatch.setattr(LocalJudge, "choice_log_probs", choose)
    monkeypatch.setattr(LocalJudge, "generate", write)


@pytest.mark.usefixtures("eloquent")
@pytest.mark.parametrize("mode", ["full", "fast"])
def test_score_prints_and_writes_what_the_judge_said(
    judge: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    page, record = tmp_path / "out.html", tmp_path / "out.json"
    arguments = ["score", str(clip), "--prompt", "a <b>cat</b>", "--judge", str(judge)]
    status = main([*arguments, "--mode", mode, "--html", str(page), "--json", str(record)])
    assert status == 0
    printed = capsys.readouterr().out
    for part in (
        f"{clip}: 40 frames of 64x48 at 24 fps (1.67 s)",
        f"judge:   {judge} ({mode})",
        "verdict: anomalous, P(clean) = 0.1824",
        "'toy_world' only; on other footage its verdict means nothing.",
        "looked:  0.25-1.00 s",
        "vanish 0.25-1.00 s, severity 2, 0 boxes. gone" if mode == "full" else "unspecified",
        "took:    scan ",
        str(page),
        str(record),
    ):
        assert part in printed
    report = AnomalyReport.from_json(record.read_text(encoding="utf-8"))
    assert (report.prompt, report.fps, report.num_frames) == ("a <b>cat</b>", 24.0, 40)
    assert json.loads(record.read_text(encoding="utf-8"))["verdict"] == "anomalous"
    html = page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html
    assert "means nothing" in html


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_any_weights_give_a_verdict_or_say_why_not(
    judge: Path, clip: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    status = main(["score", str(clip), "--judge", str(judge), "--mode", mode, "--fps", "12"])
    printed = capsys.readouterr().out
    assert "at 12 fps (3.33 s)" in printed
    assert (status, "verdict: none; the judge's answer could not be used: " in printed) in (
        (0, False),
        (3, True),
    )


def write_thin(path: Path, height: int, width: int) -> None:
    """A lossless clip of any size: h264 would want even sides."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8, options={"level": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        for shade in range(9):
            picture = np.full((height, width, 3), 20 * shade, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("mode", ["full", "fast"])
@pytest.mark.parametrize("size", [(1, 64), (64, 1), (1, 1), (1, 4096)], ids=str)
def test_one_pixel_is_a_clip_like_any_other(
    toy_judge_folder: Path, tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    path, record = tmp_path / "thin.mkv", tmp_path / "out.json"
    write_thin(path, *size)
    arguments = ["score", str(path), "--judge", str(toy_judge_folder), "--mode", mode]
    status = main([*arguments, "--json", str(record), "--html", str(tmp_path / "out.html")])
    report = AnomalyReport.from_json(record.read_text(encoding="utf-8"))
    assert (report.num_frames, report.fps) == (9, 8.0)
    assert status == (0 if report.error is None else 3)
    assert report.error is not None or 0 <= report.score <= 1


def test_bad_input_is_one_line_and_no_traceback(
    judge: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    absent = tmp_path / "absent" / "out.html"
    for arguments, message in (
        ([str(tmp_path / "no.mp4"), "--judge", str(judge)], "error: video must be an existing"),
        ([str(text), "--judge", str(judge)], "error: video must be a readable video file"),
        ([str(clip), "--judge", "Qwen/Absent"], "error: judge 'Qwen/Absent' is no folder here"),
        ([str(clip), "--judge", str(tmp_path)], "error: judge must be a folder with a config"),
        ([str(clip), "--judge", str(judge), "--dtype", "x"], "error: dtype must be one of"),
        ([str(clip), "--judge", str(judge), "--fps", "-1"], "error: fps of .* must be above 0"),
        ([str(clip), "--judge", str(judge), "--html", str(absent)], "error: folder of .*absent"),
    ):
        assert main(["score", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        with pytest.raises(ValueError, match=message):
            raise ValueError(printed.err)


@pytest.mark.parametrize("arguments", [[], ["score"], ["score", "a.mp4"], ["judge", "a.mp4"]])
def test_wrong_use_explains_itself(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: cac_reward" in capsys.readouterr().err
