"""A language model as a rater: what it is asked, what counts as an answer, and going on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the extra 'serve' is not installed")

from cac_reward.__main__ import main
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.storage import annotation_writer
from cac_reward.evaluation.pairing import Pair
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.vau_eval import (
    ASPECTS,
    RaterOptions,
    Rating,
    can_be_rated,
    measures,
    rate,
    read_scores,
)
from cac_reward.judges.base import JudgeUnreachableError
from cac_reward.judges.local import LocalJudge
from tests.cac_reward.evaluation.test_published import write_csv
from tests.cac_reward.test_judges_endpoint import JUDGE, said, scripted
from tests.openai_server import answer

SCORES = dict(zip(ASPECTS, (7, 6, 9, 5, 8), strict=True))
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def pair(name: str, text: str | None = "A man falls.", **given: Any) -> Pair:
    values = {"description": "A fall.", "reasoning": "He slips.", "verdict": "anomalous", **given}
    return Pair(AnnotatedClip(path=name, **values), Prediction(judge="j", text=text))


def options(address: str, **given: Any) -> RaterOptions:
    values = {"model": "m", "max_retries": 0, "timeout_seconds": 20.0, **given}
    return RaterOptions(base_url=address, **values)


class Server:
    """Answers by the candidate's text, and remembers what it was asked."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers = {name: list(texts) for name, texts in answers.items()}
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.pause = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.asked.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.pause.wait(0.05)
        with self._lock:
            self.at_once -= 1
            candidate = json.loads(body["messages"][1]["content"])["candidate"]
            text = self.answers[candidate].pop(0)
        if isinstance(text, int):
            return text, {"error": {"message": "no"}}
        text = text if isinstance(text, str) else json.dumps(text)
        return 200, {**said(text), "usage": USAGE}


def rated(
    server: Callable[..., Any], pairs: list[Pair], output: Path, **given: Any
) -> list[Rating]:
    with scripted(server) as address:
        return list(rate(pairs, options(address, **given), output))


def test_five_scores_come_back_and_the_question_is_whole(tmp_path: Path) -> None:
    server = Server({"A man falls.": [SCORES]})
    (found,) = rated(server, [pair("a.mp4")], tmp_path / "out.jsonl")
    assert (found.clip, found.scores, found.error) == ("a.mp4", SCORES, None)
    assert found.tokens == (100, 20)
    (body,) = server.asked
    assert body["model"] == "m"
    assert body["temperature"] == 0
    system, user = body["messages"]
    assert all(f"- {name}: {asks}" in system["content"] for name, asks in ASPECTS.items())
    assert json.loads(user["content"]) == {
        "reference": {"description": "A fall.", "reasoning": "He slips."},
        "candidate": "A man falls.",
    }
    form = body["response_format"]["json_schema"]
    assert form["strict"]
    assert form["schema"]["required"] == list(ASPECTS)
    assert measures([found])["vau_eval.total"] == {"a.mp4": 35}
    assert measures([found])["vau_eval.fluency"] == {"a.mp4": 9}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("Seven.", "answer must be JSON"),
        ("[]", "answer must be an object"),
        ({**SCORES, "fluency": 11}, "fluency must be from 0 to 10, got 11"),
        ({**SCORES, "fluency": -1}, "fluency must be from 0 to 10, got -1"),
        ({**SCORES, "fluency": 7.5}, "fluency must be an integer, got 7.5"),
        ({**SCORES, "fluency": True}, "fluency must be an integer, got True"),
        ({**SCORES, "fluency": None}, "fluency must be an integer, got None"),
        ({**SCORES, "total": 35}, "answer must have no key but"),
        ({"fluency": 7}, "answer must have 'classification'"),
        ("", "answer must be JSON"),
    ],
)
def test_another_form_is_sent_back_with_the_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    server = Server({"A man falls.": [bad, SCORES]})
    (found,) = rated(server, [pair("a.mp4")], tmp_path / "out.jsonl")
    assert found.scores == SCORES
    assert found.tokens == (200, 40)
    *_, answer, again = server.asked[1]["messages"]
    assert answer["role"] == "assistant"
    assert reason in again["content"]


def test_what_never_has_the_form_is_counted_and_asked_again_next_time(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    pairs = [pair("a.mp4", "one"), pair("b.mp4", "two"), pair("c.mp4", "three")]
    server = Server({"one": [SCORES], "two": ["?", "?"], "three": [400]})
    found = {one.clip: one for one in rated(server, pairs, output, tries=2)}
    assert found["b.mp4"].scores is None
    assert "answer must be JSON" in str(found["b.mp4"].error)
    assert found["b.mp4"].tokens == (200, 40)
    assert "the request failed" in str(found["c.mp4"].error)
    assert found["c.mp4"].tokens is None
    assert measures(found.values())["vau_eval.total"] == {"a.mp4": 35}
    # The file loses its torn end, and only what has no scores is asked again.
    with output.open("ab") as opened:
        opened.write(b'{"clip": "x')
    server = Server({"two": [SCORES], "three": [SCORES]})
    again = rated(server, pairs, output, tries=2)
    assert [one.scores for one in again] == [SCORES] * 3
    assert again[0].clip == "a.mp4"
    assert len(server.asked) == 2
    known = rated(Server({}), pairs, output, tries=2)
    assert {one.clip: one for one in known} == {one.clip: one for one in again}
    assert len(output.read_text().splitlines()) == 5


def test_another_text_or_judge_is_another_question(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rated(Server({"A man falls.": [SCORES]}), [pair("a.mp4")], output)
    other = dict.fromkeys(ASPECTS, 1)
    for changed, given in (
        (pair("a.mp4", "He sits."), {}),
        (pair("a.mp4", reasoning="He jumps."), {}),
        (pair("a.mp4"), {"model": "n"}),
    ):
        server = Server({str(changed.prediction.text): [other]})
        (found,) = rated(server, [changed], output, **given)
        assert found.scores == other


def test_only_so_many_clips_are_asked_at_once(tmp_path: Path) -> None:
    pairs = [pair(f"{number}.mp4", str(number)) for number in range(8)]
    server = Server({str(number): [SCORES] for number in range(8)})
    assert len(rated(server, pairs, tmp_path / "out.jsonl", concurrency=2)) == 8
    assert server.most_at_once == 2


def test_a_server_that_refuses_or_is_not_there_ends_the_run(tmp_path: Path) -> None:
    for status in (401, 403, 404):
        with pytest.raises(JudgeUnreachableError, match="must answer for the model 'm', got"):
            rated(Server({"A man falls.": [status]}), [pair("a.mp4")], tmp_path / "out.jsonl")
    gone = options("http://127.0.0.1:9/v1")
    with pytest.raises(JudgeUnreachableError, match=r"127\.0\.0\.1:9"):
        list(rate([pair("a.mp4")], gone, tmp_path / "out.jsonl"))


def test_servers_that_refuse_the_form_are_asked_without(tmp_path: Path) -> None:
    server = Server({"A man falls.": [SCORES]})
    rated(server, [pair("a.mp4")], tmp_path / "out.jsonl", schema="never")
    assert "response_format" not in server.asked[0]


def test_a_file_of_other_lines_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for line, message in (
        ("{}", "line 1: rating must have 'clip'"),
        (
            '{"clip": "a", "digest": "b", "scores": {}, "error": null, "tokens": null}',
            "answer must",
        ),
        (
            '{"clip": "a", "digest": "b", "scores": null, "error": "e", "tokens": [1]}',
            "tokens must",
        ),
    ):
        output.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            rated(Server({}), [], output)


def test_ratings_survive_their_line() -> None:
    for one in (
        Rating(clip="a", digest="d", scores=SCORES, tokens=(3, 4)),
        Rating(clip="a", digest="d", scores=None, error="why"),
    ):
        assert Rating.from_json(one.to_json()) == one
    assert read_scores(SCORES) == SCORES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"tries": 0}, "tries must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be above 0"),
        ({"schema": "maybe"}, "schema must be one of"),
        ({"model": ""}, "model must be the server's name"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options("http://x", **given)
    with pytest.raises(ValueError, match="base_url must begin with http"):
        options("ftp://x")


def test_text_description_and_reasoning_are_all_needed() -> None:
    whole = pair("a.mp4")
    assert can_be_rated(whole)
    assert not can_be_rated(pair("a.mp4", None))
    assert not can_be_rated(replace(whole, clip=replace(whole.clip, reasoning=None)))
    assert not can_be_rated(replace(whole, clip=replace(whole.clip, description=None)))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[str]]:
    """Two clips with reference texts, one without; VAU-R1's reasoning on all."""
    with annotation_writer(tmp_path / "clips.jsonl") as write:
        for name in ("a", "b"):
            write(pair(f"{name}.mp4").clip)
        write(AnnotatedClip(path="c.mp4", verdict="clean"))
    prose = write_csv(
        tmp_path / "text.csv",
        *({"Video Name": f"{one}.mp4", "Description": one, "Analysis": "so"} for one in "abc"),
    )
    given = ["evaluate", "--annotations", str(tmp_path / "clips.jsonl"), "--draws", "50"]
    given += ["--predictions", str(prose), "--predictions-format", "vau_r1"]
    return tmp_path / "ratings.jsonl", given


def test_the_command_rates_and_measures(
    files: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, given = files
    texts = [f"Description: {one}\nAnalysis: so" for one in "ab"]
    server = Server({texts[0]: [SCORES], texts[1]: ["?"] * 2})
    page = output.with_name("page.html")
    with scripted(server) as address:
        rating = ["--vau-eval", address, "--vau-eval-model", "m", "--vau-eval-output", str(output)]
        rating += ["--vau-eval-tries", "2", "--html", str(page)]
        assert main([*given, *rating]) == 3
        printed = capsys.readouterr()
        assert "1  VAU-Eval: no usable answer" in printed.out
        assert "1  VAU-Eval: no text, or no description with reasoning" in printed.out
        assert "1 of 2 ratings failed, first b.mp4" in printed.err
        server.answers[texts[1]] = [dict.fromkeys(ASPECTS, 5)]
        out = output.with_name("out.json")
        assert main([*given, *rating, "--json", str(out)]) == 0
    plain = json.loads(out.read_text())
    assert plain["measures"]["vau_eval.total"]["value"] == (35 + 25) / 2
    assert plain["measures"]["vau_eval.total"]["clips"] == 2
    assert plain["measures"]["vau_eval.total"]["low"] >= 25
    assert plain["measures"]["vau_eval.key_match"]["value"] == 5.5
    assert plain["counts"]["VAU-Eval: tokens read"] == 200
    # Ratings go beyond 1 and have no bar.
    assert "vau_eval.total</td><td>30.0000" in page.read_text()
    row = page.read_text().split("<td>vau_eval.total</td>")[1].split("</tr>")[0]
    assert "class=" not in row


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vau-eval", "http://x"], "vau_eval must come with --vau-eval-model"),
        (["--vau-eval-model", "m"], "vau_eval_model must be left out without --vau-eval"),
        (["--vau-eval-output", "o.jsonl"], "vau_eval_output must be left out without"),
        (["--vau-eval-tries", "2"], "vau_eval_tries must be left out without"),
        (["--vau-eval-output", "/nowhere/o"], "folder of /nowhere/o must exist"),
    ],
)
def test_wrong_use_is_one_line(
    files: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main([*files[1], *more]) == 2
    assert message in capsys.readouterr().err


def test_a_real_model_that_cannot_write_the_form_is_counted(
    files: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, given = files
    judge = LocalJudge.from_pretrained(JUDGE)
    with scripted(lambda body: (200, answer(judge, body))) as address:
        rating = ["--vau-eval", address, "--vau-eval-model", "m", "--vau-eval-output", str(output)]
        rating += ["--vau-eval-tries", "2", "--vau-eval-max-tokens", "8"]
        assert main([*given, *rating]) == 3
    assert "2  VAU-Eval: no usable answer" in capsys.readouterr().out
    lines = [Rating.from_json(line) for line in output.read_text().splitlines()]
    assert [one.scores for one in lines] == [None, None]
    assert all(one.tokens is not None and one.tokens[0] > 100 for one in lines)


def test_ctrl_c_says_how_to_go_on(
    files: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object) -> list[Rating]:
        raise KeyboardInterrupt

    monkeypatch.setattr("cac_reward.evaluation.vau_eval.rate", stopped)
    output, given = files
    rating = ["--vau-eval", "http://x", "--vau-eval-model", "m", "--vau-eval-output", str(output)]
    assert main([*given, *rating]) == 130
    assert f"stopped; the same command goes on from {output}" in capsys.readouterr().err
