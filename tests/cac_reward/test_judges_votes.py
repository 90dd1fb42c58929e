"""Consensus of sampled answers: the rule, and the local judge that follows it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cac_reward import CaCScorer
from cac_reward.judges.local import LocalJudge
from cac_reward.judges.votes import Votes, count_votes
from cac_reward.questions import SCAN_CHOICES, VERDICT_CHOICES, Message, scan_message
from cac_reward.report import AnomalyReport
from examples.toy_world.world import render_clip
from tests.tiny_judge import build_tiny_judge

CHOICES = ("Yes", "No", "<tool_call>")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> LocalJudge:
    return LocalJudge.from_pretrained(build_tiny_judge(tmp_path_factory.mktemp("judge")))


def conversation(num_frames: int) -> tuple[Message, ...]:
    times = [index / 8 for index in range(num_frames)]
    return scan_message(torch.rand(num_frames, 3, 16, 24), times, "brief")


@contextmanager
def favouring_the_choices(judge: LocalJudge) -> Iterator[None]:
    """Bring the choices' tokens far above all others, still apart from one another."""
    extra = torch.full((judge._reader.model.config.text_config.vocab_size,), -30.0)
    for token, bonus in zip(CHOICES, (0.0, 0.7, -0.4), strict=True):
        extra[judge._tokenizer.convert_tokens_to_ids(token)] = bonus
    head = judge._reader.model.lm_head
    handle = head.register_forward_hook(lambda _, __, out: out + extra)
    yield
    handle.remove()


def test_votes_are_counted_by_the_first_choice_of_each_answer() -> None:
    texts = [
        '{"findings": []}\nVerdict: clean',
        '{"findings": [{"why": "says clean"}]}\nVerdict: anomalous',
        "Verdict: anomalous\nVerdict: clean",
        "I cannot tell",
    ]
    found = count_votes(texts, '{"findings": []}\nVerdict:', VERDICT_CHOICES)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2)]))
    assert count_votes(texts[3:], "", SCAN_CHOICES).isnan().all()
    assert count_votes([], "", SCAN_CHOICES).isnan().all()


def test_shares_of_votes_come_to_the_probabilities(judge: LocalJudge) -> None:
    clips = [conversation(2), conversation(3)]
    count = 1500
    voting = judge.asked_as(votes=Votes(num_votes=count, max_new_tokens=1))
    with favouring_the_choices(judge):
        exact = judge.probabilities(judge.choice_log_probs(clips, choices=CHOICES))
        shares = voting.probabilities(voting.choice_log_probs(clips, choices=CHOICES))
    spread = (exact * (1 - exact) / count).sqrt()
    assert ((shares - exact).abs() < 4 * spread).all(), (shares, exact)
    assert exact.min() > 0.02
    assert judge.votes is None
    assert judge.decoder == "greedy"


def weigh(judge: LocalJudge, clips: list[tuple[Message, ...]], **votes: float) -> Tensor:
    voting = judge.asked_as(votes=Votes(**{"num_votes": 24, "max_new_tokens": 3, **votes}))
    with favouring_the_choices(judge):
        return voting.choice_log_probs(clips, choices=CHOICES)


def test_equal_seeds_give_equal_votes_whatever_the_batch(judge: LocalJudge) -> None:
    clips = [conversation(2), conversation(3), conversation(2)]
    found = weigh(judge, clips, seed=5)
    state = torch.get_rng_state()
    assert torch.equal(weigh(judge, clips, seed=5), found)
    assert torch.equal(torch.get_rng_state(), state), "the caller's dice are left alone"
    alone = torch.cat([weigh(judge, [one], seed=5) for one in reversed(clips)])
    assert torch.equal(alone.flip(0), found)
    assert not torch.equal(weigh(judge, clips, seed=99), found)
    cold = weigh(judge, clips, temperature=0.01)
    assert (cold.isfinite().sum(dim=1) == 1).all(), "nearly greedy votes agree"


def test_a_clip_that_no_vote_judges_has_no_score(tmp_path: Path) -> None:
    folder = build_tiny_judge(tmp_path)
    scorer = CaCScorer.from_pretrained(folder, num_votes=2, seed=3, scan={"max_frames": 2})
    scorer.judge = scorer.judge.asked_as(votes=Votes(num_votes=2, max_new_tokens=2, seed=3))
    result = scorer(torch.rand(2, 4, 3, 16, 16), ["a", "b"], fps=4.0)
    assert result["score"].isnan().all()
    assert "no probabilities" in result["reports"][0].error
    assert result["reports"][0].decoder == (
        "verdict by 2 sampled votes at temperature 1, seed 3; texts greedy"
    )


def test_a_trained_judge_votes_as_it_weighs_where_it_is_sure(
    toy_judge_folder: Path, toy_videos: Tensor
) -> None:
    clean = torch.from_numpy(render_clip(1, fault="none").frames).permute(0, 3, 1, 2) / 255
    videos = torch.stack([clean, toy_videos[1]])
    exact = CaCScorer.from_pretrained(toy_judge_folder, mode="fast")(videos, ["x"] * 2, fps=8.0)
    assert (exact["score"][0] > 0.99, exact["score"][1] < 0.01) == (True, True)
    scorers = [
        CaCScorer.from_pretrained(toy_judge_folder, mode="fast", num_votes=2, seed=1)
        for _ in range(2)
    ]
    voted, again = (scorer(videos, ["x"] * 2, fps=8.0) for scorer in scorers)
    assert voted["score"].tolist() == again["score"].tolist() == [1.0, 0.0]
    assert scorers[0].judge._reader is scorers[1].judge._reader
    for report in voted["reports"]:
        assert AnomalyReport.from_json(report.to_json()) == report
        assert report.decoder.startswith("verdict by 2 sampled votes at temperature 1, seed 1")
    assert (exact["reports"][0].decoder, exact["reports"][0].attention) == ("greedy", "sdpa")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_votes": 1}, "num_votes must be at least 2, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
    ],
)
def test_votes_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Votes(**changes)
