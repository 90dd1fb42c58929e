"""Requests of every schema become the same clips; whatever breaks a rule is refused by name."""

import base64
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.server.settings import ServerLimits, ServerSettings, is_loopback
from cac_reward.server.wire import (
    Answer,
    ClipRequest,
    WireError,
    flow_factory_clips,
    flow_factory_reply,
    own_clips,
    own_reply,
    parse_json,
    unirl_clips,
    unirl_reply,
)

LIMITS = ServerLimits(max_clips=3, max_prompt_characters=20, max_clip_bytes=30, max_frames=4)
SETTINGS = ServerSettings(limits=LIMITS)
B64 = base64.b64encode(b"some bytes").decode()
SCORED = Answer("scored", score=0.25, report={"judge_id": "j"})
UNJUDGED = Answer("unjudged", error="no verdict")
RATE = {"kwargs": {"fps": 16}}


def test_our_schema() -> None:
    body = {
        "videos": [
            {"mp4": B64, "prompt": "a cup"},
            {"mp4": B64, "fps": 12},
            {"path": "a/b.mp4"},
        ],
        "deadline_seconds": 3,
        "reports": False,
    }
    clips, deadline, reports = own_clips(body, SETTINGS)
    assert clips == [
        ClipRequest("videos[0]", "mp4", "a cup", None, (B64,)),
        ClipRequest("videos[1]", "mp4", "", 12.0, (B64,)),
        ClipRequest("videos[2]", "path", "", None, ("a/b.mp4",)),
    ]
    assert (deadline, reports) == (3.0, False)
    clips, deadline, reports = own_clips({"videos": []}, SETTINGS)
    assert (clips, deadline, reports) == ([], None, True)


def test_frames_and_safetensors_need_a_rate() -> None:
    body = {"videos": [{"frames": [B64, B64], "fps": 8.0}, {"safetensors": B64, "fps": 4}]}
    clips, _, _ = own_clips(body, SETTINGS)
    assert clips == [
        ClipRequest("videos[0]", "frames", "", 8.0, (B64, B64)),
        ClipRequest("videos[1]", "safetensors", "", 4.0, (B64,)),
    ]
    for video in body["videos"]:
        del video["fps"]
        with pytest.raises(WireError, match=r"videos\[0\].fps must be given with \w+, got none"):
            own_clips({"videos": [video]}, SETTINGS)
        clips, _, _ = own_clips({"videos": [video]}, ServerSettings(frames_fps=16.0))
        assert clips[0].fps == 16.0
        stated = {**video, "fps": 8.0}
        clips, _, _ = own_clips({"videos": [stated]}, ServerSettings(frames_fps=16.0))
        assert clips[0].fps == 8.0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, r"body must have 'videos', got \[\]"),
        ({"videos": [], "url": 1}, "body must have no key but .*, got 'url'"),
        ({"videos": 1}, "videos must be a list, got 1"),
        ({"videos": [{"mp4": B64}] * 4}, "videos must hold at most 3, got 4"),
        ({"videos": [7]}, r"videos\[0\] must be an object, got 7"),
        ({"videos": [{}]}, r"videos\[0\] must have one of .*, got none"),
        ({"videos": [{"mp4": B64, "path": "x"}]}, r"got \['mp4', 'path'\]"),
        ({"videos": [{"mp4": B64, "url": "http://a"}]}, "no key but .*, got 'url'"),
        ({"videos": [{"mp4": None}]}, r"videos\[0\].mp4 must be text, got None"),
        ({"videos": [{"mp4": ""}]}, r"videos\[0\].mp4 must be text, got ''"),
        ({"videos": [{"mp4": "A" * 44}]}, "must stay within max_clip_bytes=30, got 33"),
        ({"videos": [{"frames": [B64, 1], "fps": 1}]}, "frames must be text"),
        ({"videos": [{"frames": [], "fps": 1}]}, "frames must be text"),
        ({"videos": [{"frames": B64, "fps": 1}]}, "frames must be a list"),
        ({"videos": [{"frames": ["A"] * 5, "fps": 1}]}, "must hold at most 4, got 5"),
        ({"videos": [{"frames": ["A" * 20] * 3, "fps": 1}]}, "max_clip_bytes=30, got 45"),
        ({"videos": [{"mp4": B64, "prompt": 3}]}, r"prompt of videos\[0\] must be text .*, got 3"),
        ({"videos": [{"mp4": B64, "prompt": "a" * 21}]}, "at most 20 characters, got 21 char"),
        ({"videos": [{"mp4": B64, "prompt": "\ud800"}]}, r"text of videos\[0\] must be Unicode"),
        ({"videos": [{"path": "\ud800"}]}, r"text of videos\[0\] must be Unicode"),
        ({"videos": [{"mp4": B64, "fps": 0}]}, r"videos\[0\].fps must be a number above 0, got 0"),
        ({"videos": [{"mp4": B64, "fps": 10**400}]}, "must be a number above 0, got 1000"),
        ({"videos": [{"mp4": B64, "fps": math.inf}]}, "must be a number above 0, got inf"),
        ({"videos": [{"mp4": B64, "fps": True}]}, "must be a number above 0, got True"),
        ({"videos": [{"mp4": B64, "fps": "8"}]}, "must be a number above 0, got '8'"),
        ({"videos": [], "deadline_seconds": -1}, "deadline_seconds must be a number above 0"),
        ({"videos": [], "reports": 1}, "reports must be true or false, got 1"),
    ],
)
def test_what_breaks_our_schema_is_named(body: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        own_clips(body, SETTINGS)


def test_a_path_may_be_longer_than_a_clip() -> None:
    clips, _, _ = own_clips({"videos": [{"path": "a" * 100}]}, SETTINGS)
    assert clips[0].content == ("a" * 100,)


def test_our_reply() -> None:
    assert own_reply([SCORED, UNJUDGED], reports=True) == {
        "results": [
            {"status": "scored", "score": 0.25, "error": None, "report": {"judge_id": "j"}},
            {"status": "unjudged", "score": None, "error": "no verdict", "report": None},
        ]
    }
    assert "report" not in own_reply([SCORED], reports=False)["results"][0]


def unirl(**changes: object) -> dict[str, Any]:
    """What UniRL's remote reward sends for one video."""
    request = {
        "history": [{"text": "a cup", "video_b64": B64}],
        "required_rewards": ["cac"],
        "metadata": None,
        "request_id": "r1",
        "sample_id": "s1",
        "group_id": "g1",
        "source_rank": 0,
        "policy_version": None,
        "scorer_version": None,
        "idempotency_key": "k",
    }
    return {"protocol_version": "1", "requests": [{**request, **changes}]}


def test_unirl() -> None:
    body = unirl()
    (clip,) = unirl_clips(body, SETTINGS)
    assert clip == ClipRequest("requests[0].history[0]", "mp4", "a cup", None, (B64,))
    turns = [{"text": "old", "image_b64": B64}, {"text": "new", "video_path": "v.mp4"}]
    (clip,) = unirl_clips(unirl(history=turns, metadata={"fps": 16}), SETTINGS)
    assert clip == ClipRequest("requests[0].history[1]", "path", "new", 16.0, ("v.mp4",))
    assert unirl_reply(body, [SCORED], "toy") == {
        "results": [{"cac": {"p_clean": 0.25}}],
        "errors": [{}],
        "identities": [
            {
                "request_id": "r1",
                "sample_id": "s1",
                "group_id": "g1",
                "source_rank": 0,
                "policy_version": None,
                "idempotency_key": "k",
                "scorer_version": "toy",
            }
        ],
        "protocol_version": "1",
    }
    assert unirl_clips({"requests": []}, SETTINGS) == []


def test_unirls_reply_keeps_order_errors_and_identities() -> None:
    requests = [
        *unirl()["requests"],
        *unirl(request_id="r2", sample_id=None)["requests"],
        *unirl(request_id="r3")["requests"],
    ]
    reply = unirl_reply({"requests": requests}, [SCORED, UNJUDGED, SCORED], "toy")
    assert json.loads(json.dumps(reply, allow_nan=False)) == reply
    assert reply["results"] == [{"cac": {"p_clean": 0.25}}, {}, {"cac": {"p_clean": 0.25}}]
    assert reply["errors"] == [{}, {"cac": "no verdict"}, {}]
    assert [one["request_id"] for one in reply["identities"]] == ["r1", "r2", "r3"]
    assert reply["identities"][1]["sample_id"] is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"protocol_version": "2", "requests": []}, "protocol_version must be '1', got '2'"),
        ({"grad_mode": True, "requests": []}, "grad_mode must be false"),
        ({}, "requests must be a list, got None"),
        ({"requests": [1]}, r"requests\[0\] must be an object"),
        (unirl(required_rewards=["hps"]), r"required_rewards must be \['cac'\], got \['hps'\]"),
        (unirl(required_rewards=[]), r"required_rewards must be \['cac'\], got \[\]"),
        (unirl(required_rewards="cac"), r"required_rewards must be \['cac'\], got 'cac'"),
        (
            unirl(required_rewards=[["cac"]]),
            r"required_rewards must be \['cac'\], got \[\['cac'\]\]",
        ),
        (unirl(scorer_version="1.0"), "scorer_version must be null"),
        (unirl(history=["a"]), r"requests\[0\].history\[0\] must be an object, got 'a'"),
        (unirl(history=[{"text": "a", "video_b64": 7}]), "mp4 must be text, got 7"),
        (
            unirl(history=[{"text": "a", "video_b64": B64}, {"text": "b", "image_b64": B64}]),
            r"history\[1\] must have video_b64 or video_path, got none",
        ),
        (unirl(history=[]), "history must have at least one turn"),
        (unirl(history=None), "history must be a list"),
        (unirl(history=[{"text": "a", "image_b64": B64}]), "video_b64 or video_path, got none"),
        (unirl(history=[{"text": "a", "video_b64": B64, "video_path": "b"}]), "video_path, got"),
        (unirl(history=[{"video_b64": B64}]), r"prompt of requests\[0\].history\[0\] must be text"),
        (unirl(metadata=[1]), r"metadata must be an object, got \[1\]"),
        (unirl(metadata={"fps": -1}), "metadata.fps must be a number above 0"),
    ],
)
def test_what_breaks_unirls_schema_is_named(body: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        unirl_clips(body, SETTINGS)


def test_flow_factory() -> None:
    today = {"prompt": ["a"], "image": None, "video": [[B64, B64]], "kwargs": {"fps": 16}}
    clip = ClipRequest("video[0]", "frames", "a", 16.0, (B64, B64))
    assert flow_factory_clips(today, SETTINGS) == [clip]
    older = {"prompts": ["a"], "videos": [[B64, B64]], "extra": {"fps": 16}}
    assert flow_factory_clips(older, SETTINGS) == [clip]
    assert flow_factory_reply([SCORED, SCORED]) == {"rewards": [0.25, 0.25]}
    reply = flow_factory_reply([SCORED, UNJUDGED])
    assert reply["error"] == "1 of 2 videos have no reward; video[1]: no verdict"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": ["a"], "image": [B64]}, "video must be a list, got None"),
        ({"prompt": ["a", "b"], "video": [[B64]]}, "one clip for each of 2 prompts, got 1"),
        ({"prompt": ["a"], "video": [[B64]]}, r"video\[0\].fps must be given with frames"),
        ({"prompt": ["a"], "video": [[B64]], "kwargs": 3}, "kwargs must be an object, got 3"),
        ({"prompt": ["a"], "video": [[B64]], "kwargs": {"fps": 0}}, "kwargs.fps must be a number"),
        ({"prompt": ["a"], "video": [[B64]], "kwargs": {"fps": "8"}}, "above 0, got '8'"),
        ({"prompt": "a", "video": [[B64]]}, "prompt must be a list, got 'a'"),
        ({"prompt": [7], "video": [[B64]], **RATE}, r"prompt of video\[0\] must be text .*, got 7"),
        ({"prompt": ["a"], "video": [B64], **RATE}, r"video\[0\].frames must be a list"),
        ({"prompt": ["a"], "video": [[]], **RATE}, r"video\[0\].frames must be text, got \[\]"),
        ({"prompt": ["a"], "video": [[B64, 7]], **RATE}, r"video\[0\].frames must be text"),
    ],
)
def test_what_breaks_flow_factorys_schema_is_named(body: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        flow_factory_clips(body, SETTINGS)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "body must be JSON"),
        (b"{", "body must be JSON"),
        (b"\xff\xfe", "body must be JSON"),
        (b"[1]", r"body must be a JSON object, got \[1\]"),
        (b'{"a": NaN}', "numbers must be finite, got NaN"),
        (b'{"a": -Infinity}', "numbers must be finite, got -Infinity"),
        (b"[" * 100_000, "body must be JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "body must be JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        parse_json(body)


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "videos requests prompt video mp4 frames path fps history metadata text kwargs "
                "video_b64 required_rewards reports deadline_seconds protocol_version".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["videos", "requests", "prompt", "video"]), TREES))
def test_no_tree_of_json_is_anything_but_read_or_refused(body: dict[str, Any]) -> None:
    assert parse_json(json.dumps(body).encode()) == body
    for read in (own_clips, unirl_clips, flow_factory_clips):
        with suppress(WireError):
            read(body, SETTINGS)


def test_base64_is_undone_into_one_file(tmp_path: Path) -> None:
    parts = [b"first", b"second part"]
    texts = tuple(base64.b64encode(part).decode() for part in parts)
    clip = ClipRequest("videos[0]", "frames", "", 8.0, texts)
    assert clip.write(tmp_path / "a") == (5, 11)
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    with pytest.raises(FileExistsError):
        clip.write(tmp_path / "a")


@pytest.mark.parametrize("text", ["a", "====", "not base64!", "A\nA=", "\u00e4\u00e4\u00e4\u00e4"])
def test_what_is_no_base64_is_refused(text: str, tmp_path: Path) -> None:
    clip = ClipRequest("videos[2]", "mp4", "", None, (text,))
    with pytest.raises(WireError, match=r"videos\[2\].mp4 must (be base64|not be empty)"):
        clip.write(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"token": "short"}, "token must have at least 16 characters, got 5"),
        ({"token": "a line\nand another"}, "token must be printable ASCII"),
        ({"host": "0.0.0.0"}, "host must be a loopback address where there is no token"),
        ({"host": "example.org"}, "host must be a loopback address"),
        ({"port": 70_000}, r"port must be in \[0, 65535\], got 70000"),
        ({"media_root": Path("/does/not/exist")}, "media_root must be an existing folder"),
        ({"frames_fps": 0.0}, "frames_fps must be above 0, got 0"),
        ({"frames_fps": math.inf}, "frames_fps must be above 0, got inf"),
    ],
)
def test_settings_that_are_unsafe_or_wrong_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ServerSettings(**changes)


def test_another_address_is_fine_with_a_token() -> None:
    settings = ServerSettings(host="0.0.0.0", token="a" * 16)
    assert "a" * 16 not in repr(settings)


@pytest.mark.parametrize("name", ["max_frames", "decode_seconds", "max_queue"])
def test_limits_must_be_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        ServerLimits(**{name: 0})


def test_a_decoder_has_memory_for_what_it_may_decode() -> None:
    ServerLimits(max_decoded_bytes=1000, decode_memory_bytes=256 * 1024**2 + 2000)
    with pytest.raises(ValueError, match="decode_memory_bytes must be at least 268437456 for max_"):
        ServerLimits(max_decoded_bytes=1000, decode_memory_bytes=256 * 1024**2 + 1999)


def test_a_batch_fits_the_queue() -> None:
    with pytest.raises(ValueError, match="max_batch must be at most max_queue=4, got 5"):
        ServerLimits(max_batch=5, max_queue=4)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1.evil.org", "localhost.evil.org"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
