"""Tokens that a judgement costs: counted at the model's door, and by what a server says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward.judges.local import _LOADED, LocalJudge, _beginnings
from cac_reward.judges.tokens import TokenCount, current_meter, metering
from cac_reward.judges.votes import Votes
from cac_reward.questions import Message
from cac_reward.report import AnomalyReport
from cac_reward.scorer import CaCScorer
from tests.cac_reward.test_scorer import CallingJudge, Part, ScriptedJudge, folder, score
from tests.cac_reward.test_scorer import clips as flat_clips

__all__ = ["folder"]  # A fixture.


class Door:
    """Counts the tokens that go into a model's forward pass, padding left out."""

    def __init__(self, judge: LocalJudge) -> None:
        self.tokens = 0
        forward = judge._reader.forward

        def counted(ids: torch.Tensor, mask: torch.Tensor, *rest: Any, **more: Any) -> Any:
            self.tokens += int(mask[:, -ids.shape[1] :].sum())
            return forward(ids, mask, *rest, **more)

        judge._reader.forward = counted  # type: ignore[method-assign]


@pytest.fixture
def judge(folder: Path) -> LocalJudge:
    """A real model with random weights; not shared with other tests."""
    _LOADED.clear()
    return CallingJudge.from_pretrained(folder)


def totals(reports: Sequence[AnomalyReport]) -> tuple[int, int]:
    counts = [report.tokens for report in reports]
    assert None not in counts
    return tuple(
        sum(count for one in counts for name, count in (one or {}).items() if name.endswith(kind))
        for kind in (".read", ".written")
    )  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_what_goes_through_the_model_is_what_the_report_says(judge: LocalJudge, mode: str) -> None:
    door = Door(judge)
    scorer = CaCScorer(judge, mode=mode, max_call_tokens=3, max_findings_tokens=5)
    (report,) = scorer.inspect(torch.rand(1, 13, 3, 32, 32), fps=8.0)
    assert report.tokens is not None
    assert set(report.tokens) == {"scan.read", "scan.written", "inspect.read", "inspect.written"}
    read, written = totals([report])
    answers = 2 if mode == "full" else 1
    # The last token of an answer is chosen, but never read back.
    assert door.tokens == read + written - answers
    assert written == (3 + 5 if mode == "full" else 3)


def test_the_token_that_ends_an_answer_is_counted(judge: LocalJudge) -> None:
    judge._stops = list(range(len(judge._tokenizer)))
    door = Door(judge)
    with metering(1) as meter:
        judge.generate([(Message("user", ("Say A.",)),)], max_new_tokens=5)
    assert meter.of(0) == TokenCount(door.tokens, 1)


def test_batches_cost_each_clip_what_it_costs_alone(judge: LocalJudge) -> None:
    videos = torch.rand(3, 13, 3, 32, 32)
    scorer = CaCScorer(judge, max_call_tokens=3, max_findings_tokens=5)
    together = [one.tokens for one in scorer.inspect(videos, fps=8.0)]
    assert together == [scorer.inspect(one[None], fps=8.0)[0].tokens for one in videos]


def test_votes_are_counted_with_all_that_they_write(judge: LocalJudge) -> None:
    door = Door(judge)
    votes = Votes(num_votes=3, max_new_tokens=4)
    scorer = CaCScorer(judge.asked_as(votes=votes), mode="fast", max_call_tokens=3)
    (report,) = scorer.inspect(torch.rand(1, 13, 3, 32, 32), fps=8.0)
    read, written = totals([report])
    calls = 3 + (report.scan_text.startswith("<tool_call>")) + 3 * bool(report.windows)
    assert door.tokens == read + written - calls


def test_a_judge_that_does_not_count_leaves_it_unknown() -> None:
    _, _, (report,) = score(CaCScorer(ScriptedJudge([Part()])), 1)
    assert report.tokens is None


class HalfCounting(ScriptedJudge):
    """Counts its choices, never what it writes."""

    def choice_log_probs(self, conversations: Any, **rest: Any) -> torch.Tensor:
        meter = current_meter(len(conversations))
        for row in range(len(conversations)):
            meter.add(row, read=7, written=0)
        return super().choice_log_probs(conversations, **rest)


def test_one_call_that_is_not_counted_makes_the_clip_unknown() -> None:
    judge = HalfCounting([Part(scan=(0.3, 0.1, 0.1)), Part()])
    first, second = CaCScorer(judge).inspect(flat_clips(2), fps=8.0)
    assert first.tokens == {"scan.read": 7, "scan.written": 0}
    assert second.tokens is None


def test_a_meter_adds_and_loses() -> None:
    with metering(2) as meter:
        assert current_meter(2) is meter
        meter.add(0, read=2, written=1)
        meter.add(0, read=3, written=0)
        meter.add(1, read=1, written=1)
        meter.lose(1)
    assert current_meter(2) is not meter
    assert [meter.of(0), meter.of(1)] == [TokenCount(5, 1), None]


def test_only_the_longest_beginnings_are_read() -> None:
    assert _beginnings([(1,), (2,)]) == []
    assert _beginnings([(1, 2, 3), (1, 2), (4, 5)]) == [(1, 2), (4,)]


def test_a_server_says_what_its_answers_cost() -> None:
    pytest.importorskip("openai", reason="the extra 'serve' is not installed")
    from cac_reward.judges.endpoint import EndpointJudge, EndpointOptions
    from tests.cac_reward.test_judges_endpoint import ASKED, QUICK, said, scripted

    def reply(usage: dict[str, int] | None) -> Callable[[dict[str, Any]], tuple[int, Any]]:
        def answer(body: dict[str, Any]) -> tuple[int, Any]:
            if body["messages"][0]["content"] == "broken":
                return 400, {"error": {"message": "no"}}
            return 200, {**said("A", {"A": 0.75, "B": 0.25}), "usage": usage}

        return answer

    usage = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}
    options = EndpointOptions(**QUICK, probabilities="log_probs")
    voting = EndpointOptions(**QUICK, probabilities="votes", num_votes=3)
    for given, each in ((usage, TokenCount(11, 2)), (None, None)):
        with scripted(reply(given)) as address:
            judge = EndpointJudge(address, "m", options=options)
            with metering(2) as meter:
                judge.generate([ASKED, ASKED], max_new_tokens=4)
            assert [meter.of(0), meter.of(1)] == [each, each]
            with metering(1) as meter:
                judge.choice_log_probs([ASKED], choices=["A", "B"])
            assert meter.of(0) == each
            with metering(1) as meter:
                EndpointJudge(address, "m", options=voting).choice_log_probs(
                    [ASKED], choices=["A", "B"]
                )
            assert meter.of(0) == (each and TokenCount(33, 6))


def test_a_request_that_fails_leaves_the_cost_unknown() -> None:
    pytest.importorskip("openai", reason="the extra 'serve' is not installed")
    from cac_reward.judges.endpoint import EndpointJudge, EndpointOptions
    from tests.cac_reward.test_judges_endpoint import ASKED, QUICK, said, scripted

    usage = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        second = body["messages"][-1]["content"] == "A"
        if second or body.get("seed") == 1:
            return 400, {"error": {"message": "no"}}
        return 200, {**said("A", {"A": 0.75, "B": 0.25}), "usage": usage}

    for options, choices in (
        (EndpointOptions(**QUICK, probabilities="log_probs"), ["AC", "B"]),
        (EndpointOptions(**QUICK, probabilities="votes", num_votes=3), ["A", "B"]),
    ):
        with scripted(reply) as address, metering(1) as meter:
            EndpointJudge(address, "m", options=options).choice_log_probs([ASKED], choices=choices)
        assert meter.of(0) is None
