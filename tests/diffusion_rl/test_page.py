"""The report is one well-formed page that fetches nothing and escapes every text."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from diffusion_rl.charts import BarChart, Line, LineChart
from diffusion_rl.clips import Clip, Mark
from diffusion_rl.comparison import compare_all
from diffusion_rl.page import (
    Section,
    Table,
    VideoPair,
    comparison_table,
    write_page,
    write_report,
)

NAN = float("nan")
HOSTILE = "</h3></script><script>alert('x')</script><img src=http://example.com/x onerror=1>&\"'"
SUMMARY = {
    "base": {"videos": 256, "anomaly_rate_oracle": 0.5, "motion": 0.03},
    "tuned": {"videos": 256, "anomaly_rate_oracle": 0.2, "motion": 0.0285},
    "relative_reduction_oracle": 0.6,
    "relative_reduction_oracle_ci95": [0.5, 0.7],
    "training_seconds": 583.1,
    "reward_calls": 12800,
    "judge": "toy",
    "unmeasured": NAN,
    "versions": {"torch": "2.10"},
}
VOID = {"meta", "img", "line", "rect", "polyline", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and insists that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def clip(score: float | None = 0.1, marks: tuple[Mark, ...] = (), note: str = "") -> Clip:
    return Clip(torch.rand(3, 3, 16, 16), 8.0, score, marks, note=note)


def written(tmp_path, **changes) -> str:
    content = {"title": "Run", "summary": SUMMARY} | changes
    return write_report(tmp_path / "made" / "report.html", **content).read_text(encoding="utf-8")


def test_the_page_holds_everything_given(tmp_path):
    page = written(
        tmp_path,
        curves=[
            LineChart(title="Reward", lines=[Line("a", [0, 1], [0.0, 1.0])], x_label="update"),
            BarChart(title="Kinds", labels=["vanish"], series={"base": [0.3]}),
        ],
        tables=[Table(title="Audit", columns=["copy", "passed"], rows=[["frozen", 0.25]])],
        video_pairs=[
            VideoPair(
                prompt="a red circle",
                base=clip(0.07, (Mark("vanish", (0.5, 1.0), why="it is gone"),), "oracle: vanish"),
                tuned=clip(0.97),
            )
        ],
        notes=["Measured on two cores."],
    )
    reader = Reader(page)
    for text in (
        *("Run", "Reward", "Kinds", "Audit", "frozen", "0.250", "a red circle", "vanish"),
        *("0.50-1.00 s: it is gone", "oracle: vanish", "P(clean) 0.07", "P(clean) 0.97"),
        *("Measured on two cores.", "training seconds", "583", "12,800"),
    ):
        assert text in reader.text
    assert reader.tags.count("svg") == 2
    assert reader.tags.count("img") == 2
    assert ("class", "verdict broken") in reader.attributes
    assert ("class", "verdict clean") in reader.attributes


def test_sections_keep_their_order_and_empty_ones_are_left_out(tmp_path):
    table = Table(title="Costs", columns=["a", "b"], rows=[["x", 1]])
    sections = [
        Section(title="", tables=[table]),
        Section(title="Nothing"),
        Section(title="Trust", paragraphs=[HOSTILE], tables=[table]),
    ]
    path = write_page(
        tmp_path / "page.html", title="Run", lead=HOSTILE, summary={}, sections=sections
    )
    page = path.read_text(encoding="utf-8")
    headings = re.findall("<h([1-6])>(.*?)</h", page)
    assert headings == [
        ("1", "Run"),
        ("2", "Costs"),
        ("2", "Trust"),
        ("3", "Costs"),
        ("2", "Everything in numbers"),
    ]
    assert Reader(page).text.count("<script>alert") == 2
    assert "script" not in Reader(page).tags


def test_the_cards_show_the_effect_with_its_interval_and_both_generators(tmp_path):
    cards = re.findall(r'<div class="(card[^"]*)">(.*?)</div>', written(tmp_path))
    shown = [(kind, re.sub("<[^>]+>", "|", body).strip("|")) for kind, body in cards]
    assert shown == [
        ("card effect", "relative reduction oracle||60.0%||95% interval 50.0% to 70.0%"),
        ("card", "anomaly rate oracle||20.0%||before 50.0%"),
        ("card", "motion||0.0285||before 0.0300, 95% of it kept"),
    ]


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    page = written(tmp_path, video_pairs=[VideoPair(prompt="a", base=clip(), tuned=clip(None))])
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    sources = [value for name, value in reader.attributes if name in ("src", "href", "srcset")]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_every_text_is_escaped(tmp_path):
    hostile_clip = clip(0.1, (Mark(HOSTILE, (0.0, 0.1), why=HOSTILE),), HOSTILE)
    page = written(
        tmp_path,
        title=HOSTILE,
        summary={
            **SUMMARY,
            HOSTILE: HOSTILE,
            "base": {HOSTILE: 1.0},
            "tuned": {HOSTILE: 2.0},
            HOSTILE + "2": 0.5,
            HOSTILE + "2_ci95": [0.1, 0.9],
        },
        tables=[Table(title=HOSTILE, columns=2 * [HOSTILE], rows=[2 * [HOSTILE]], caption=HOSTILE)],
        video_pairs=[VideoPair(prompt=HOSTILE, base=hostile_clip, tuned=clip())],
        notes=[HOSTILE],
    )
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not [value for name, value in reader.attributes if name == "onerror"]
    assert reader.text.count("<script>alert") >= 12


def test_the_summary_is_kept_whole_as_strict_json(tmp_path):
    kept = re.search(r"<pre>(.*?)</pre>", written(tmp_path), re.DOTALL).group(1)
    assert json.loads(unescape(kept)) == {**SUMMARY, "unmeasured": None}


def test_an_empty_summary_makes_a_page(tmp_path):
    assert "<h1>Run</h1>" in written(tmp_path, summary={})


def test_a_report_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(path, title="new", summary={}) == path
    assert "new" in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_failing_disk_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_rl.whole_files.os.replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(path, title="new", summary={})
    assert path.read_text() == "old"


def test_comparisons_become_a_table_with_intervals():
    base = {
        "anomaly_rate": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "motion": torch.tensor([0.2, 0.2, 0.2, 0.2]),
        "reward": torch.tensor([-1.0, 1.0, NAN, 1.0]),
        "kept": torch.tensor([0.0, 0.0, 1.0, 1.0]),
    }
    tuned = {name: values.clone() for name, values in base.items()}
    tuned["anomaly_rate"] = torch.zeros(4)
    tuned["motion"] = base["motion"] * 0.9
    table = comparison_table(compare_all(base, tuned), percent=["kept"])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["anomaly rate"][:3] == ["50.0%", "0.0%", "-50.0 points"]
    assert rows["motion"] == ["0.200", "0.180", "-10.0%", "-10.0% to -10.0%", 4]
    assert rows["reward"] == ["0.333", "0.333", "+0", "+0 to +0", 3]
    assert rows["kept"][:2] == ["50.0%", "50.0%"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rows of table 't' must have 2 entries, got 1"):
        Table(title="t", columns=["a", "b"], rows=[["x"]])
