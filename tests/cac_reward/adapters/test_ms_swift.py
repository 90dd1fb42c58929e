"""The contract of ms-swift's orms (swift/rewards/orm.py and its GRPO trainer)."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from cac_reward.adapters import ms_swift
from cac_reward.adapters.ms_swift import cac_orm
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
    mp4,
    red_of,
)


def make(orm: type, args: object = None) -> object:
    """How the trainer makes a reward: with those of its arguments that the class names."""
    named = list(inspect.signature(orm.__init__).parameters)
    given = {name: getattr(args, name) for name in named if hasattr(args, name)}
    return orm(args=args, **given) if "args" in named else orm(**given)


def call(reward: object, completions: list[str], rows: dict) -> torch.Tensor:
    """How the trainer calls it and reads the answer."""
    answer = reward(completions, trainer_state=object(), **rows)
    return torch.tensor([torch.nan if one is None else one for one in answer])


def render(texts: list[str]) -> torch.Tensor:
    return torch.stack([as_float(clip(int(text))) for text in texts])


def test_videos_made_from_completions() -> None:
    orms = {"cac": cac_orm(StubScorer(), render=render, fps=FPS)}
    reward = make(orms["cac"], SimpleNamespace(num_generations=2))
    assert reward.args.num_generations == 2
    expect(call(reward, ["51", "102"], {"solution": ["", ""]}).tolist(), [51, 102])


def test_its_own_column_of_videos(tmp_path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120)))
    scorer = StubScorer()
    reward = make(cac_orm(scorer, column="videos"))
    messages = [[{"role": "user", "content": "is it broken?"}]] * 2
    scores = call(reward, ["yes", "no"], {"videos": [[str(file)]] * 2, "messages": messages})
    assert scores.tolist() == pytest.approx([red_of(file.read_bytes())] * 2)
    assert scorer.seen[0][1] == ["is it broken?"] * 2
    call(reward, ["yes"], {"videos": [[str(file)]]})
    assert scorer.seen[1][1] == [""]


def test_the_judge_is_loaded_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        ms_swift, "scorer_of", lambda *judge, **how: asked.append((judge, how)) or StubScorer()
    )
    cac_orm("some/judge", column="videos", device="cuda:1", dtype="float16")
    assert asked == [(("some/judge",), {"device": "cuda:1", "dtype": "float16"})]


def test_failures() -> None:
    def judge(**failing: object) -> list[float | None]:
        reward = make(cac_orm(StubScorer(), render=render, fps=FPS, **failing))
        return reward([str(UNJUDGED), "51"])

    assert judge() == [None, pytest.approx(0.2)]
    assert judge(on_failure=0.5) == [0.5, pytest.approx(0.2)]
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        judge(on_failure="raise")


def test_a_running_server_in_place_of_a_folder(reward_server, tmp_path) -> None:
    orm = cac_orm(reward_server.url, render=render, fps=FPS)
    assert call(make(orm), ["60", "180"], {}).tolist() == pytest.approx([60 / 255, 180 / 255])
    assert make(orm)(["10", "60"])[0] is None
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120)))
    scores = call(make(cac_orm(reward_server.url, column="videos")), ["a"], {"videos": [str(file)]})
    assert scores.tolist() == pytest.approx([red_of(file.read_bytes())], abs=1e-6)
