"""The contract of UniRL's reward service: its scorers and its /score schema.

The service is not installed here: a stand-in with its documented base class takes its place.
Source: Tencent-Hunyuan/UniRL, unirl-reward-service/reward_service/schemas.py and scorers/base.py.
"""

import base64
import json
import math
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cac_reward.adapters import unirl
from cac_reward.adapters.base import VideoReward
from cac_reward.adapters.unirl import parse_score, score_reply
from tests.cac_reward.adapters.stub_scorer import FPS, UNJUDGED, StubScorer, clip, mp4, red_of


class BaseScorer:
    """What their base class declares."""

    name = ""
    version = "1"
    input_kind = "image"
    supports_offload = False
    supports_grad = False
    sub_metric_names: tuple[str, ...] = ()

    def health(self) -> dict:
        return {"name": self.name, "input_kind": self.input_kind}


@dataclass(frozen=True)
class ScoreItem:
    """What their gateway hands to a scorer."""

    history: list[tuple[str, None]]
    videos: tuple[bytes | str | None, ...] | None = None
    metadata: dict | None = None


@pytest.fixture
def scorer_class(monkeypatch: pytest.MonkeyPatch) -> type:
    names = ("reward_service", "reward_service.scorers", "reward_service.scorers.base")
    parts = [ModuleType(name) for name in names]
    parts[2].BaseScorer = BaseScorer
    for part in parts:
        monkeypatch.setitem(sys.modules, part.__name__, part)
    unirl._scorer_class.cache_clear()
    yield unirl.CaCVideoScorer
    unirl._scorer_class.cache_clear()


def test_it_is_one_of_theirs(scorer_class) -> None:
    assert issubclass(scorer_class, BaseScorer)
    assert scorer_class(StubScorer()).health() == {"name": "cac", "input_kind": "video"}
    assert scorer_class.sub_metric_names[0] == "p_clean"
    assert not scorer_class.supports_grad
    assert pickle.loads(pickle.dumps(scorer_class)) is scorer_class


def test_bytes_and_paths_of_any_length(scorer_class, tmp_path: Path) -> None:
    first, second = mp4(clip(100)), mp4(clip(200, 5), 16.0)
    file = tmp_path / "clip.mp4"
    file.write_bytes(second)
    stub = StubScorer()
    items = [
        ScoreItem([("no", None), ("a cup", None)], (None, first)),
        ScoreItem([("a dog", None)], (str(file),), {"policy_version": 1}),
    ]
    scores = scorer_class(stub).score(items)
    assert [list(row) for row in scores] == [["p_clean"], ["p_clean"]]
    assert [row["p_clean"] for row in scores] == pytest.approx([red_of(first), red_of(second)])
    assert [(prompts, fps) for _, prompts, fps in stub.seen] == [(["a cup"], 8), (["a dog"], 16)]
    scorer_class(stub, fps=24.0).score(items)  # Believed over the 8 of UniRL's client.
    assert [fps for _, _, fps in stub.seen[2:]] == [24, 24]


def test_the_judge_is_loaded_as_configured(scorer_class, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        unirl, "scorer_of", lambda *judge, **how: asked.append((judge, how)) or StubScorer()
    )
    how = {"device": "cuda:1", "dtype": "float16", "mode": "fast", "revision": "main"}
    scorer_class("some/judge", fps=16.0, **how)
    assert asked == [(("some/judge",), how)]


def test_no_items_no_answers(scorer_class) -> None:
    assert scorer_class(StubScorer()).score([]) == []


def test_failures(scorer_class) -> None:
    broken = ScoreItem([("a", None)], (mp4(clip(100))[:300],))
    whole = ScoreItem([("b", None)], (mp4(clip(100)),))
    scores = scorer_class(StubScorer()).score([broken, whole])
    assert math.isnan(scores[0]["p_clean"])
    assert scores[1]["p_clean"] == pytest.approx(red_of(whole.videos[0]))
    assert scorer_class(StubScorer(), on_failure=0).score([broken])[0]["p_clean"] == 0
    with pytest.raises(RuntimeError, match="1 of 1 videos could not be judged: video must be"):
        scorer_class(StubScorer(), on_failure="raise").score([broken])


@pytest.mark.parametrize("videos", [None, (), (b"", None)])
def test_an_item_without_a_video_is_refused(scorer_class, videos) -> None:
    with pytest.raises(ValueError, match="item 0 must have a video on its last turn, got none"):
        scorer_class(StubScorer()).score([ScoreItem([("a", None)], videos)])


def test_without_the_service_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reward_service", None)
    unirl._scorer_class.cache_clear()
    with pytest.raises(ImportError, match="CaCVideoScorer needs reward_service: install unirl"):
        _ = unirl.CaCVideoScorer
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = unirl.Nothing


VIDEO = mp4(clip(100))
TURN = {"text": "a cup", "video_b64": base64.b64encode(VIDEO).decode()}


def body(**changes: object) -> dict:
    """What UniRL's client posts for one video, after its way over the wire."""
    request = {
        "history": [TURN],
        "required_rewards": ["cac"],
        "metadata": None,
        "request_id": "7",
        "sample_id": "7",
        "group_id": "1",
        "source_rank": 0,
        "policy_version": 3,
        "scorer_version": None,
        "idempotency_key": "abc",
        **changes,
    }
    return json.loads(json.dumps({"protocol_version": "1", "requests": [request]}))


def test_a_request_is_read() -> None:
    (request,) = parse_score(body(metadata={"seed": 1}))
    assert (request.prompt, request.video, request.video_path) == ("a cup", VIDEO, None)
    assert request.required_rewards == ("cac",)
    assert request.metadata == {"seed": 1}
    (request,) = parse_score(body(history=[{"text": "a", "video_path": "/data/a.mp4"}]))
    assert (request.video, request.video_path, request.metadata) == (None, "/data/a.mp4", {})
    turns = [{"text": "draw", "image_b64": "AAAA"}, TURN]
    assert parse_score(body(history=turns))[0].prompt == "a cup"
    assert parse_score({"requests": []}) == []


def test_the_answer_keeps_order_errors_and_identities() -> None:
    requests = parse_score(
        {"requests": body()["requests"] * 2 + body(request_id="8", sample_id=None)["requests"]}
    )
    reward = VideoReward(scorer=StubScorer(), fps=FPS, value_range="0..255", on_failure="mask")
    outcome = reward([clip(51), clip(UNJUDGED), clip(102)], [one.prompt for one in requests])
    reply = json.loads(json.dumps(score_reply(requests, outcome), allow_nan=False))
    assert reply["results"] == [
        {"cac": {"p_clean": pytest.approx(0.2)}},
        {},
        {"cac": {"p_clean": pytest.approx(0.4)}},
    ]
    assert reply["errors"] == [{}, {"cac": "too red to judge"}, {}]
    assert reply["protocol_version"] == "1"
    assert reply["identities"][2] == {
        "request_id": "8",
        "sample_id": None,
        "group_id": "1",
        "source_rank": 0,
        "policy_version": 3,
        "idempotency_key": "abc",
        "scorer_version": None,
    }
    with pytest.raises(ValueError, match="one score for each of 2 requests, got 3"):
        score_reply(requests[:2], outcome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": []}, r"requests\[0\].history must be a list of turns, got \[\]"),
        ({"history": ["a"]}, r"requests\[0\].history\[0\] must be an object, got str"),
        ({"history": [{"text": "a"}]}, r"history\[0\] must carry one of .*video_path.*, got none"),
        ({"history": [{**TURN, "text": None}]}, r"history\[0\].text must be text, got NoneType"),
        ({"history": [{"text": "a", "video_b64": 7}]}, "video_b64 must be text, got int"),
        ({"history": [{**TURN, "video_path": "/a"}]}, "only one of video_b64 and video_path"),
        ({"history": [{"text": "a", "video_b64": "***"}]}, r"\[0\].video_b64 must be base64"),
        ({"history": [TURN, {"text": "a", "image_b64": "AAAA"}]}, "end in a turn with a video"),
        ({"required_rewards": ["ocr"]}, r"must name some of \['cac'\], got \['ocr'\]"),
        ({"required_rewards": []}, r"must name some of \['cac'\], got \[\]"),
        ({"required_rewards": "cac"}, r"must name some of \['cac'\], got 'cac'"),
        ({"required_rewards": [["cac"]]}, r"must name some of \['cac'\]"),
        ({"metadata": []}, r"requests\[0\].metadata must be an object, got list"),
        ({"scorer_version": "2"}, "scorer_version must be null, got '2'; drop expected_scorer"),
    ],
)
def test_wrong_requests_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_score(body(**changes))


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ([], "body must be an object, got list"),
        ({}, "requests must be a list, got NoneType"),
        ({"requests": [7]}, r"requests\[0\] must be an object, got int"),
        ({"protocol_version": "2", "requests": []}, "protocol_version must be '1', got '2'"),
    ],
)
def test_wrong_bodies_are_refused(whole: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_score(whole)


def test_another_name_of_the_reward() -> None:
    (request,) = parse_score(body(required_rewards=["mine"]), rewards=["mine"])
    outcome = VideoReward(scorer=StubScorer())([request.video], [request.prompt])
    reply = score_reply([request], outcome, reward="mine")
    assert reply["results"] == [{"mine": {"p_clean": pytest.approx(red_of(VIDEO))}}]
    assert torch.isfinite(outcome.scores).all()
