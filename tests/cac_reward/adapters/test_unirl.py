"""The contract of the scorers of UniRL's reward service.

The service is not installed here: a stand-in with its documented base class takes its place.
Source: Tencent-Hunyuan/UniRL, unirl-reward-service/reward_service/scorers/base.py.
"""

import math
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from cac_reward.adapters import unirl
from tests.cac_reward.adapters.stub_scorer import StubScorer, clip, mp4, red_of


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
