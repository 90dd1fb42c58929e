"""An annotated clip checks itself, whatever it is made from."""

from typing import Any

import pytest

from cac_reward.data.annotations import (
    AnnotatedClip,
    Caption,
    SchemaError,
    conversion_hint,
    upgrade,
)
from cac_reward.report import Box, Finding, TimeWindow

FINDING = Finding("jump", TimeWindow(0, 1), (Box(0.5, 0, 0, 1, 1),), 3, "why")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"path": ""}, "path must name a file, got ''"),
        ({"path": "a\nb"}, "path must be one printable line"),
        (
            {"path": "https://a.b/c.mp4"},
            "path must be a local file, got 'https://a.b/c.mp4'; fetch",
        ),
        ({"path": 3}, "path must be text, got 3"),
        ({"key": ""}, "key must be null where it is not known, got ''"),
        ({"split": 1}, "split must be text"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
        ({"prompt": None}, "prompt must be text"),
        ({"description": " "}, "description must be null where there is none, got ' '"),
        ({"reflection": ""}, "reflection must be null where there is none"),
        ({"extra": {"a": 1}}, r"extra\['a'\] must be text, got 1"),
        ({"fps": 0}, "fps must be above 0, got 0.0"),
        ({"fps": "8"}, "fps must be a number"),
        ({"duration_seconds": -1}, "duration_seconds must be above 0, got -1.0"),
        ({"width": 0, "height": 1}, "width must be 1 to 1000000 pixels, got 0"),
        ({"width": 1, "height": 10**7}, "height must be 1 to 1000000 pixels, got 10000000"),
        ({"width": 3}, "width and height must be known together, got 3 and None"),
        ({"findings": [3]}, "findings must hold Finding objects, got 3"),
        ({"verdict": "bad"}, "verdict must be one of .* or null, got 'bad'"),
        (
            {"verdict": "clean", "findings": [FINDING]},
            "verdict must be 'anomalous' where there are",
        ),
        ({"answer": "a"}, "question must be given with options and answer"),
        ({"question": "q", "options": ["a"]}, "options must be 2 to 26, got 1"),
        ({"question": "q", "options": ["a", 2]}, "options must be text, got 2"),
        ({"question": "q", "options": "ab", "answer": "C"}, "letter of an option, A to B, got 'C'"),
        (
            {"question": "q", "options": "ab", "answer": ""},
            "answer must be null where there is none",
        ),
        ({"question": "q", "options": "ab", "answer": "AB"}, "A to B, got 'AB'"),
    ],
)
def test_rules(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AnnotatedClip(**{"path": "a.mp4", **values})


def test_findings_make_a_clip_anomalous_and_nothing_else_does() -> None:
    assert AnnotatedClip(path="a", findings=[FINDING]).verdict == "anomalous"
    assert AnnotatedClip(path="a").verdict is None
    assert AnnotatedClip(path="a", verdict="anomalous").findings == ()


def test_names_and_lengths() -> None:
    clip = AnnotatedClip(path="s.tar", key="7", fps=7.99, duration_seconds=2.0)
    assert (clip.name, clip.origin, clip.num_frames) == ("s.tar#7", "s.tar#7", 16)
    assert AnnotatedClip(path="a", source_video="b").origin == "b"
    assert AnnotatedClip(path="a", fps=8).num_frames is None


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        ({"findings": {}}, "findings must be a list"),
        ({"findings": [{}]}, "finding must have 'type'"),
        ({"captions": [{"window": [0, 1], "text": ""}]}, "caption must say something, got ''"),
        ({"captions": [{"window": [1, 1], "text": "a"}]}, "window must have 0 <= start < end"),
        ({"options": "ab", "question": "q"}, "options must be a list"),
        ({"extra": []}, "extra must be an object"),
    ],
)
def test_plain_values_are_read_strictly(plain: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AnnotatedClip.from_dict({"schema_version": 1, "path": "a", **plain})


def test_null_is_the_same_as_leaving_out() -> None:
    plain = AnnotatedClip(path="a").to_dict()
    assert plain == {"schema_version": 1, "path": "a"}
    nulls = dict.fromkeys(("key", "prompt", "findings", "options", "extra", "fps"), None)
    assert AnnotatedClip.from_dict(plain | nulls) == AnnotatedClip(path="a")


def test_a_caption_is_read_back() -> None:
    caption = Caption(TimeWindow(0.1, 0.3), "two\nlines")
    assert Caption.from_json(caption.to_json()) == caption


def test_other_versions_are_told_apart() -> None:
    with pytest.raises(SchemaError, match="schema_version must be 1, got 7"):
        upgrade({"schema_version": 7, "path": "a"})
    assert conversion_hint(0, "d/f.jsonl") == (
        "convert it with: cac-reward annotate convert d/f.jsonl --output d/f.v1.jsonl"
    )
    assert "update with: pip install --upgrade" in conversion_hint(2, "f.jsonl")
