"""The evidence page as text: whole, escaped, and fetching nothing."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward.drawing import COLOURS
from cac_reward.page import write_page
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
from cac_reward.video import Video

HOSTILE = "</script><script>alert('1')</script>\"><img src=x onerror=alert(1)>&amp;"
VOID = {"meta", "input", "img", "br", "link"}


def hostile_report(**changes: Any) -> AnomalyReport:
    values: dict[str, Any] = {
        "score": 0.25,
        "judge_id": HOSTILE,
        "fps": 8.0,
        "num_frames": 8,
        "findings": (
            Finding("x<b>'\"", TimeWindow(0.25, 0.5), (Box(0.25, 0.1, 0.1, 0.5, 0.5),), 3, HOSTILE),
            Finding("camera", TimeWindow(0.5, 2.0)),
        ),
        "windows": (TimeWindow(0.0, 0.75),),
        "inspect_frames": tuple(range(8)),
        "scan_text": HOSTILE,
        "judge_text": HOSTILE,
        "prompt": HOSTILE,
        "timings": {HOSTILE: 1.0},
        "tokens": {HOSTILE: 12},
        "note": HOSTILE,
    }
    return AnomalyReport(**{**values, **changes})


class Page(HTMLParser):
    """Tags and texts of a page, as a browser reads them; every tag must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        (self.scripts if inside == "script" else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clips" / "a #1?%41 '\".mp4"
    path.parent.mkdir()
    Video(torch.full((8, 3, 20, 30), 100, dtype=torch.uint8), 8.0).save(path)
    return path


def record(clip: Path, **changes: Any) -> ClipRecord:
    return ClipRecord(path=str(clip), width=30, height=20, report=hostile_report(**changes))


def written(path: Path, records: list[ClipRecord], **options: Any) -> Page:
    write_page(path, records, **options)
    assert list(path.parent.glob("*.partial")) == []
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("videos", ["embed", "link"])
def test_no_text_becomes_markup(tmp_path: Path, clip: Path, videos: str) -> None:
    failed = ClipRecord(path=HOSTILE, error=HOSTILE)
    records = [record(clip), failed]
    page = written(tmp_path / "p.html", records, videos=videos, title=HOSTILE)
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"img", "iframe", "object", "link", "a", "base"}
    assert len(page.scripts) == len(page.all("script")) == 1
    assert "alert" not in page.scripts[0]
    names = {name for _, attrs in page.tags for name in attrs}
    assert not any(name.startswith("on") for name in names)
    # Title, heading, judge, prompt, note, reason, two turns, circumstances, and the bad file's two.
    assert sum(HOSTILE in text for text in page.texts) == 11


@pytest.mark.parametrize(("videos", "media"), [("embed", "data:"), ("link", "'self' file:")])
def test_the_page_fetches_nothing_and_runs_only_its_script(
    tmp_path: Path, clip: Path, videos: str, media: str
) -> None:
    page = written(tmp_path / "p.html", [record(clip)], videos=videos)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policies = [one["content"] for one in page.all("meta") if "http-equiv" in one]
    assert policies == [
        f"default-src 'none'; media-src {media}; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    for address in ("http://", "https://", "url(", "import(", "fetch(", "@import"):
        assert address not in text


def test_an_embedded_clip_is_the_clip(tmp_path: Path, clip: Path) -> None:
    page = written(tmp_path / "p.html", [record(clip)])
    (video,) = page.all("video")
    kind, _, data = str(video["src"]).partition(",")
    assert kind == "data:video/mp4;base64"
    shown = Video.decode(io.BytesIO(base64.b64decode(data)))
    assert (shown.num_frames, shown.fps, shown.width / shown.height) == (8, 8.0, 1.5)
    assert (shown.frames.float() - 100).abs().max() < 4


def test_a_linked_clip_is_found_from_the_page(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "pages").mkdir()
    page = written(tmp_path / "pages" / "p.html", [record(clip)], videos="link")
    (video,) = page.all("video")
    assert video["src"] == "../clips/a%20%231%3F%2541%20%27%22.mp4"
    assert (tmp_path / "pages" / "p.html").stat().st_size < 40_000


def test_the_page_shows_verdict_windows_and_findings(tmp_path: Path, clip: Path) -> None:
    page = written(tmp_path / "p.html", [record(clip, prompt="a cat")])
    for text in ("anomalous", "P(clean) 0.250", "0.25 to 0.50 s", "severity 3, 1 box"):
        assert text in page.texts
    assert "severity 2, whole frame" in page.texts
    assert [bar["style"] for bar in page.all("i")] == [
        "left:0.00%;width:75.00%",
        f"left:25.00%;width:25.00%;background:{COLOURS[0]}",
        f"left:50.00%;width:50.00%;background:{COLOURS[1]}",
    ]
    (article,) = page.all("article")
    assert (article["data-score"], article["data-verdict"]) == ("0.25", "anomalous")
    assert json.loads(str(article["data-types"])) == ["camera", "x<b>'\""]
    first, second = json.loads(str(article["data-clip"]))["findings"]
    assert (first["first"], first["stop"], first["boxes"]) == (2, 4, [[0.25, 0.1, 0.1, 0.5, 0.5]])
    assert (second["first"], second["stop"], second["boxes"]) == (4, 8, [])
    buttons = [one["data-frame"] for one in page.all("button") if "data-frame" in one]
    assert buttons == ["2", "4"]


def test_a_window_behind_the_end_leads_to_the_last_frame(tmp_path: Path, clip: Path) -> None:
    late = record(clip, findings=(Finding("jump", TimeWindow(5.0, 6.0)),), windows=())
    page = written(tmp_path / "p.html", [late])
    assert [bar["data-frame"] for bar in page.all("i")] == ["7"]
    assert page.all("i")[0]["style"] == f"left:100.00%;width:0.00%;background:{COLOURS[0]}"


def test_clips_without_a_score_say_why(tmp_path: Path, clip: Path) -> None:
    unusable = record(
        clip, score=None, error="tool call: must be JSON", findings=(), windows=(), note=None
    )
    unreadable = ClipRecord(path="b.mp4", error="video must be a readable video file")
    page = written(tmp_path / "p.html", [unusable, unreadable, record(clip)])
    for text in ("tool call: must be JSON", "not judged", "video must be a readable video file"):
        assert text in page.texts
    assert [one["data-verdict"] for one in page.all("article")] == [
        *("unjudged", "unjudged", "anomalous")
    ]
    assert [one["data-score"] for one in page.all("article")] == ["", "", "0.25"]
    (summary,) = [text for text in page.texts if text.startswith("3 clips; ")]
    assert "1 of 1 judged anomalous (100.0%); mean P(clean) 0.250; 2 without a score" in summary
    assert "No findings." in page.texts


def test_the_summary_counts_as_the_clips_say(tmp_path: Path, clip: Path) -> None:
    even = [record(clip, score=score) for score in (0.5, 0.4999, 0.9)]
    twice = (Finding("jump", TimeWindow(0.0, 0.5)), Finding("jump", TimeWindow(0.5, 1.0)))
    page = written(tmp_path / "p.html", [*even, record(clip, findings=twice)])
    verdicts = [one["data-verdict"] for one in page.all("article")]
    assert verdicts == ["clean", "anomalous", "clean", "anomalous"]
    assert any("2 of 4 judged anomalous (50.0%)" in text for text in page.texts)
    assert "jump (1)" in page.texts  # One clip, however many findings it has.


def test_a_page_without_clips_is_a_page(tmp_path: Path) -> None:
    page = written(tmp_path / "p.html", [])
    assert "0 clips" in page.texts


def test_what_cannot_be_shown_is_an_error_and_leaves_no_page(tmp_path: Path, clip: Path) -> None:
    def refused(path: Path, records: list[ClipRecord], **options: Any) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            write_page(path, records, **options)
        assert not path.exists()
        assert list(tmp_path.glob("*.partial")) == []
        return str(caught.value)

    message = refused(tmp_path / "p.html", [], videos="copy")
    assert message == "videos must be one of ('embed', 'link'), got 'copy'"
    message = refused(tmp_path / "no" / "p.html", [])
    assert re.fullmatch("folder of .*p.html must exist; make it first", message)
    changed = record(clip, num_frames=9)
    message = refused(tmp_path / "p.html", [changed])
    assert "must still have its 9 frames of 30x20, got 8 of 30x20 in" in message
    clip.unlink()
    assert "video must be an existing file" in refused(tmp_path / "p.html", [record(clip)])
