"""The reward contract at the door and at the way out; names that fail helpfully."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from diffusion_rl.memory_errors import OutOfMemoryError
from diffusion_rl.reward_contract import RESUME, plain_report
from diffusion_rl.reward_worker import answer
from diffusion_rl.rewards import (
    Calls,
    Reward,
    RewardSettings,
    ask_rewards,
    build_reward,
    judge_videos,
    load_callable,
)

NAN = float("nan")
PROMPTS = ["a", "b", "c", "d"]
VIDEOS = torch.rand(4, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def constant(*scores: float, **others) -> object:
    """A reward that always gives these scores."""

    def reward(videos, prompts, *, fps):
        return {"score": torch.tensor(scores), **others} if others else torch.tensor(scores)

    return reward


def judge(*functions, weights=None, videos=VIDEOS, prompts=PROMPTS, fps=8.0, **options):
    weights = weights or [1.0] * len(functions)
    rewards = [
        Reward(f"reward{index}", function, weight)
        for index, (function, weight) in enumerate(zip(functions, weights, strict=True))
    ]
    return judge_videos(rewards, videos, prompts, fps=fps, **options)


def test_rewards_are_added_by_weight_and_kept_apart():
    batch = judge(constant(1.0, 2.0, 3.0, 4.0), constant(1.0, 0.0, 1.0, 0.0), weights=[0.5, -2.0])
    torch.testing.assert_close(batch.score, torch.tensor([-1.5, 1.0, -0.5, 2.0]))
    assert list(batch.judgements) == ["reward0", "reward1"]
    torch.testing.assert_close(
        batch.judgements["reward0"].score, torch.tensor([1.0, 2.0, 3.0, 4.0])
    )


def test_a_nan_of_any_reward_makes_the_video_nan(caplog):
    batch = judge(constant(1.0, NAN, 3.0, 4.0), constant(1.0, 1.0, NAN, 1.0))
    assert batch.score.isnan().tolist() == [False, True, True, False]
    assert "'reward0' could not judge 1 of 4 videos" in caplog.text


def test_a_reward_of_weight_zero_is_only_logged():
    batch = judge(constant(1.0, 2.0, 3.0, 4.0), constant(NAN, 1.0, 1.0, 1.0), weights=[1.0, 0.0])
    torch.testing.assert_close(batch.score, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert batch.judgements["reward1"].score.isnan().tolist() == [True, False, False, False]


def test_the_reward_is_given_videos_prompts_and_rate():
    seen = {}

    def reward(videos, prompts, *, fps):
        seen.update(videos=videos, prompts=prompts, fps=fps, grad=torch.is_grad_enabled())
        return torch.zeros(4)

    judge(reward, fps=12.5)
    assert seen["videos"] is VIDEOS
    assert seen["prompts"] == PROMPTS
    assert seen["fps"] == 12.5
    assert seen["grad"] is False


def test_blame_and_reports_come_through():
    blame = torch.rand(4, 3, 2, 2)
    batch = judge(constant(1.0, 2.0, 3.0, 4.0, blame=blame, reports=["w", "x", "y", "z"]))
    judgement = batch.judgements["reward0"]
    assert torch.equal(judgement.blame, blame)
    assert judgement.reports == ["w", "x", "y", "z"]


def test_a_score_of_another_precision_becomes_float32():
    score = torch.tensor([1.0, 2.0, 3.0, NAN], dtype=torch.float64, requires_grad=True)
    batch = judge(lambda videos, prompts, *, fps: score)
    assert batch.score.dtype == torch.float32
    assert not batch.score.requires_grad


def test_too_many_unjudged_videos_stop_the_run():
    reports = ["fine", "fine", "fine", "no verdict in: hello " + "x" * 300]
    scores = constant(1.0, NAN, NAN, NAN, reports=reports)
    with pytest.raises(RuntimeError, match="'reward0' returned NaN for 3 of 4 videos") as caught:
        judge(scores)
    assert 'last report: "no verdict in: hello xx' in str(caught.value)
    assert "x" * 200 not in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert judge(scores, missing_limit=0.8).score.isnan().sum() == 3


def test_a_report_that_holds_its_error_is_quoted_by_it():
    class Report:
        error = "tool call: must be JSON"

        def __str__(self):
            return "y" * 300

    scores = constant(NAN, NAN, 1.0, NAN, reports=[Report()] * 4)
    with pytest.raises(RuntimeError, match='last report: "tool call: must be JSON"; '):
        judge(scores)


def test_nothing_judged_at_all_always_stops_the_run():
    with pytest.raises(RuntimeError, match="returned NaN for 4 of 4 videos, more than"):
        judge(constant(NAN, NAN, NAN, NAN), missing_limit=0.99)


def test_rewards_that_together_leave_too_many_videos_unjudged_stop_the_run():
    halves = (constant(1.0, 2.0, NAN, NAN), constant(NAN, NAN, 1.0, 2.0))
    message = (
        "rewards 'reward0', 'reward1' together returned NaN for 4 of 4 videos, more than "
        "missing_limit 0.5; .* run the same command again"
    )
    with pytest.raises(RuntimeError, match=message):
        judge(*halves)
    assert not judge(*halves, weights=[1.0, 0.0]).score[:2].isnan().any()  # The other only watches.
    most = judge(*halves[:1], constant(1.0, NAN, NAN, 1.0), missing_limit=0.75)
    assert most.score.isnan().sum() == 3


def test_a_reward_that_raises_is_named_and_the_cause_kept():
    def broken(videos, prompts, *, fps):
        raise KeyError("lens")

    with pytest.raises(
        RuntimeError, match="'reward0' raised KeyError: 'lens'; .* what is saved"
    ) as caught:
        judge(broken)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(3), r"score of reward 'reward0' must be .* shape \(4,\), got \(3,\)"),
        (torch.zeros(4, 1), r"must be a tensor of shape \(4,\), got \(4, 1\)"),
        ([1.0] * 4, r"must be a tensor of shape \(4,\), got list"),
        (None, r"must be a tensor of shape \(4,\), got NoneType"),
        (torch.zeros(4).long(), "must be finite floats, or NaN .* got torch.int64"),
        (torch.full((4,), torch.inf), "must be finite floats, or NaN .* got infinity"),
        ({"scores": torch.zeros(4)}, r"a dict of score, blame and reports, got .*\['scores'\]"),
        ({"score": torch.zeros(4), "blam": 1}, r"got a dict of \['blam', 'score'\]"),
        ({"score": torch.zeros(4), "reports": [1]}, r"reports .* one per video \(4\), got 1"),
        (
            {"score": torch.zeros(4), "blame": torch.zeros(4, 2, 4, 4)},
            r"blame of reward 'reward0' must be .* \(4, 3\), got \(4, 2, 4, 4\)",
        ),
        ({"score": torch.zeros(4), "blame": "left"}, r"B and F of the videos \(4, 3\), got str"),
        (
            {"score": torch.zeros(4), "blame": torch.full((4, 3, 4, 4), 1.5)},
            r"blame of reward 'reward0' must be in \[0, 1\], got min=1.50, max=1.50",
        ),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(answer, message):
    with pytest.raises(ValueError, match=message) as caught:
        judge(lambda videos, prompts, *, fps: answer)
    assert "run the same command again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": VIDEOS[0]}, "videos has shape .* 'B F C H W' need 5 axes, not 4"),
        ({"videos": VIDEOS.transpose(1, 2)[:, :, :2]}, r"with 3 channels, got shape \(4, 3, 2"),
        ({"videos": VIDEOS[:, :0]}, r"videos must not be empty, got shape \(4, 0, 3, 4, 4\)"),
        ({"videos": VIDEOS.numpy()}, "videos must be a floating point tensor .*, got ndarray"),
        ({"videos": (VIDEOS * 255).byte()}, "videos must be a floating .*, got torch.uint8"),
        ({"videos": VIDEOS * NAN}, "videos must be finite"),
        (
            {"videos": VIDEOS.round() * 2 - 1},
            r"must be in \[0, 1\], got min=-1.00, max=1.00; rescale with \(x \+ 1\) / 2",
        ),
        ({"videos": VIDEOS * 255}, r"must be in \[0, 1\], got .*; divide by 255"),
        ({"prompts": ["a"]}, r"prompts must be one per video \(4\), got 1"),
        ({"prompts": "four"}, r"prompts must be one per video \(4\), got 1"),
        ({"fps": 0.0}, "fps must be a finite number above 0, got 0.0"),
        ({"fps": NAN}, "fps must be a finite number above 0, got nan"),
        ({"missing_limit": 1.0}, r"missing_limit must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        judge(constant(0.0, 0.0, 0.0, 0.0), **change)


def test_rewards_need_different_names():
    reward = Reward("twin", constant(0.0, 0.0, 0.0, 0.0))
    for rewards in ([reward, reward], []):
        with pytest.raises(ValueError, match="rewards must be at least one and have different"):
            judge_videos(rewards, VIDEOS, PROMPTS, fps=8.0)


def test_a_target_is_found_by_module_and_attribute():
    assert load_callable("diffusion_rl.rewards:load_callable") is load_callable
    assert load_callable("pathlib:Path.exists").__name__ == "exists"


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("diffusion_rl.rewards", ValueError, "target must be 'module:name', got 'diffusion_rl"),
        (":name", ValueError, "target must be 'module:name'"),
        ("module:", ValueError, "target must be 'module:name'"),
        (
            "diffusion_lr:x",
            ImportError,
            "no module 'diffusion_lr'; near names: .*diffusion_rl.*PYTHONPATH",
        ),
        (
            "diffusion_rl.reward:x",
            ImportError,
            "no module 'diffusion_rl.reward'; near names: rewards",
        ),
        (
            "diffusion_rl.rewards:load_calable",
            ImportError,
            "module 'diffusion_rl.rewards' has no 'load_calable'; near names: load_callable",
        ),
        (
            "pathlib:Path.exsts",
            ImportError,
            "'Path' of module 'pathlib' has no 'exsts'; near names: exists",
        ),
        ("math:pi", ValueError, "target 'math:pi' must be callable, got float"),
    ],
)
def test_a_wrong_target_says_which_half_failed(target, error, message):
    with pytest.raises(error, match=message):
        load_callable(target)


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "reward_lacking_a_package.py").write_text("import no_such_package_here\n")
    (tmp_path / "reward_lacking_a_name.py").write_text("from math import no_such_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="was found, but .* needs 'no_such_package_here'"):
        load_callable("reward_lacking_a_package:reward")
    with pytest.raises(ImportError, match="was found, but importing it failed: cannot import"):
        load_callable("reward_lacking_a_name:reward")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "reward_plugin.py").write_text(
        "import torch\n"
        "class Scorer:\n"
        "    def __init__(self, bonus): self.bonus = bonus\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, path, *, bonus=0.0): return cls(bonus)\n"
        "    def __call__(self, videos, prompts, *, fps):\n"
        "        return torch.full((len(prompts),), self.bonus)\n"
        "def brightness(videos, prompts, *, fps, scale=1.0):\n"
        "    return scale * videos.flatten(1).mean(1)\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("reward_plugin", None)


def build(target: str, **options) -> Reward:
    return build_reward(RewardSettings(name="mine", target=target, weight=2.0, options=options))


@pytest.mark.usefixtures("plugin")
def test_a_factory_is_called_with_its_options():
    reward = build("reward_plugin:Scorer.from_pretrained", path="here", bonus=0.5)
    batch = judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    torch.testing.assert_close(batch.score, torch.ones(4))


@pytest.mark.usefixtures("plugin")
def test_a_plain_function_is_the_reward_itself():
    reward = build("reward_plugin:brightness", scale=3.0)
    batch = judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    torch.testing.assert_close(batch.score, 6 * VIDEOS.flatten(1).mean(1))


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("Scorer.from_pretrained", {}, "must fit .*: missing a required argument: 'path'"),
        (
            "Scorer.from_pretrained",
            {"path": "x", "bonis": 1},
            "options of reward 'mine' must fit .*'bonis'; near names: bonus",
        ),
        ("brightness", {"scal": 1.0}, "must fit .*'scal'; near names: scale"),
        ("number", {}, "'reward_plugin:number' must return a reward .* got int"),
    ],
)
def test_options_that_do_not_fit_are_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        build(f"reward_plugin:{target}", **options)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="name must not be empty"):
        RewardSettings(name="", target="a:b")
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        RewardSettings(name="a", target="a:b", weight=NAN)


def alter_all(videos):
    videos.mul_(0.5)


def alter_a_part(videos):
    videos[0, 0, 0].flatten()[0] = 0.5


def alter_detached(videos):
    videos.detach().clamp_(0.2, 0.8)


@pytest.mark.parametrize("change", [alter_all, alter_a_part, alter_detached])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("options", [{}, {"videos_per_call": 2, "on_error": "missing"}])
def test_a_reward_that_changes_the_videos_is_named(change, raises, options):
    seen = []

    def careless(videos, prompts, *, fps):
        change(videos)
        if raises:
            raise KeyError("lens")
        return torch.zeros(len(videos))

    def later(videos, prompts, *, fps):
        seen.append(videos)
        return torch.zeros(len(videos))

    rewards = [Reward("careless", careless, calls=Calls(**options)), Reward("later", later)]
    message = r"changed by a reward, got 1 changes .* by reward 'careless'; .* videos.clone\(\)"
    with pytest.raises(ValueError, match=message):
        judge_videos(rewards, VIDEOS.clone(), PROMPTS, fps=8.0)
    assert not seen


class Structured:
    def __init__(self, **found):
        self.found = found

    def to_dict(self):
        return self.found


def test_a_report_becomes_what_json_holds_or_names_its_reward():
    assert plain_report("mine", Structured(window=(0, 1.5))) == {"window": [0, 1.5]}
    assert plain_report("mine", {"window": [0, 1.5]}) == {"window": [0, 1.5]}
    assert plain_report("mine", {1, 2}) == "{1, 2}"
    for value in (np.float32(0.5), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"to_dict\(\) of reports of reward 'mine' must hold"):
            plain_report("mine", Structured(severity=value))


def test_a_reward_may_change_a_copy_of_the_videos():
    def careful(videos, prompts, *, fps):
        own = videos.clone().mul_(0.5)
        return own[:, 0, 0, 0, 0]

    for inference in (False, True):
        with torch.inference_mode(inference):
            videos = VIDEOS.clone()
            batch = judge(careful, videos=videos)
        assert torch.equal(batch.score, VIDEOS[:, 0, 0, 0, 0] / 2)
        assert torch.equal(videos, VIDEOS)


def failing(times: int, **others):
    """A reward that raises at its first calls, then scores by brightness."""
    calls = []

    def reward(videos, prompts, *, fps):
        calls.append(list(prompts))
        if len(calls) <= times:
            raise ConnectionError("gone")
        return videos.flatten(1).mean(1)

    return reward, calls


def asked(function, **calls) -> Reward:
    return Reward("mine", function, calls=Calls(retry_seconds=0.0, **calls))


def test_a_failed_call_is_made_again_as_often_as_asked():
    for times, retries in ((0, 0), (2, 2)):
        function, calls = failing(times)
        batch = judge_videos([asked(function, retries=retries)], VIDEOS, PROMPTS, fps=8.0)
        assert len(calls) == times + 1
        torch.testing.assert_close(batch.score, VIDEOS.flatten(1).mean(1))
    function, calls = failing(3)
    with pytest.raises(RuntimeError, match="'mine' raised ConnectionError: gone"):
        judge_videos([asked(function, retries=2)], VIDEOS, PROMPTS, fps=8.0)
    assert len(calls) == 3


def test_pauses_double_up_to_a_minute_and_end_when_nobody_waits(monkeypatch):
    function, calls = failing(99)
    reward = Reward("mine", function, calls=Calls(retries=9, retry_seconds=0.5))
    pauses = []
    monkeypatch.setattr(reward.closed, "wait", lambda seconds: pauses.append(seconds))
    with pytest.raises(RuntimeError, match="gone"):
        judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    monkeypatch.undo()
    calls.clear()
    reward.close()
    with pytest.raises(RuntimeError, match="gone"):
        judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    assert len(calls) == 1


def test_videos_of_a_call_that_failed_may_be_left_missing(caplog):
    function, calls = failing(1)
    reward = asked(function, on_error="missing", videos_per_call=3)
    with pytest.raises(RuntimeError, match="NaN for 3 of 4 videos, more .*ConnectionError: gone"):
        judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    assert calls == [["a", "b", "c"], ["d"]]
    function, _ = failing(1)
    reward = asked(function, on_error="missing", videos_per_call=2)
    batch = judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
    assert batch.score.isnan().tolist() == [True, True, False, False]
    torch.testing.assert_close(batch.score[2:], VIDEOS.flatten(1).mean(1)[2:])
    assert batch.judgements["mine"].unanswered == 2
    assert "2 videos are left unjudged" in caplog.text


EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", EXHAUSTED)
def test_memory_that_runs_out_in_a_reward_is_no_failed_call(error):
    calls = []

    def large(videos, prompts, *, fps):
        calls.append(len(videos))
        raise error

    for size, fewer in (
        (None, "its videos_per_call=2 asks about fewer at once \\(now 4\\); "),
        (1, ""),
    ):
        reward = asked(large, retries=2, on_error="missing", videos_per_call=size)
        message = (
            f"memory ran out in reward 'mine' .*\\); {fewer}where: process with a device of its"
        )
        with pytest.raises(OutOfMemoryError, match=message) as raised:
            judge_videos([reward], VIDEOS, PROMPTS, fps=8.0, missing_limit=0.9)
        assert raised.value.__cause__ is error
    assert calls == [4, 1]


def test_memory_that_runs_out_elsewhere_is_a_failed_call():
    class ServerError(RuntimeError):
        pass

    def far(videos, prompts, *, fps):
        raise ServerError("503: CUDA out of memory")

    batch = ask_rewards([asked(far, on_error="missing")], VIDEOS, PROMPTS, fps=8.0).answers()
    assert batch["mine"].unanswered == 4

    def large(videos, prompts, *, fps):
        raise EXHAUSTED[0]

    header, tensors = answer("mine", large, {"prompts": PROMPTS, "fps": 8.0}, {"videos": VIDEOS})
    assert not tensors
    assert re.match(r"OutOfMemoryError: .*\(CUDA out of .*videos_per_call=2 .*", header["failed"])
    assert RESUME not in header["failed"]


def test_a_broken_answer_stops_the_run_whatever_is_said_of_failures():
    reward = asked(constant(1.0), on_error="missing", retries=3)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(1,\)"):
        judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)


def test_blame_and_reports_of_several_calls_are_put_together():
    def reward(videos, prompts, *, fps):
        if prompts[0] == "a":
            return videos.flatten(1).mean(1)
        size = 2 if prompts[0] == "b" else sizes
        blame = videos.mean(2)[..., :size, :size]
        return {"score": torch.zeros(len(prompts)), "blame": blame, "reports": list(prompts)}

    sizes = 2
    batch = judge_videos([asked(reward, videos_per_call=1)], VIDEOS, PROMPTS, fps=8.0)
    found = batch.judgements["mine"]
    assert found.reports == [None, "b", "c", "d"]
    assert torch.equal(found.blame[1:], VIDEOS.mean(2)[1:, :, :2, :2])
    assert not found.blame[0].any()
    sizes = 3
    with pytest.raises(ValueError, match=r"must be of one size .* got \[\(3, 2, 2\), \(3, 3, 3\)"):
        judge_videos([asked(reward, videos_per_call=1)], VIDEOS, PROMPTS, fps=8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "there"}, "where must be one of here, process, http, got there; near names: he"),
        ({"on_error": "mising"}, "on_error must be one of .*, got mising; near names: missing"),
        ({"where": "http"}, "target must be 'http://HOST' .* got a:b with where: http"),
        ({"target": "http://a"}, "'module:name' with any other, got http://a with where: here"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"retry_seconds": -1.0}, "retry_seconds must be at least 0, got -1.0"),
        ({"videos_per_call": 0}, "videos_per_call must be at least 1, got 0"),
        ({"calls_at_once": 2}, "calls_at_once must be 1 with where: here, got 2"),
        ({"timeout_seconds": 5.0}, "timeout_seconds must be left out with where: here, got 5.0"),
        ({"where": "process", "timeout_seconds": 0.0}, "timeout_seconds must be above 0, got 0.0"),
    ],
)
def test_settings_of_calls_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings(**{"name": "a", "target": "a:b", **options})


def test_a_server_is_asked_patiently_and_in_small_calls_unless_told_otherwise():
    calls = RewardSettings(name="a", target="http://a", where="http").calls
    assert (calls.retries, calls.videos_per_call, calls.elsewhere) == (5, 8, True)
    calls = RewardSettings(name="a", target="a:b").calls
    assert (calls.retries, calls.videos_per_call, calls.elsewhere) == (0, None, False)
    assert RewardSettings(name="a", target="a:b", where="process", retries=2).calls.retries == 2
