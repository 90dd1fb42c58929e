"""Learning from rewards: what is read and written, what counts, and that it learns."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cac_reward.answers import write_tool_call
from cac_reward.judges.loading import LoadOptions, find_files, load
from cac_reward.judges.local import LocalJudge
from cac_reward.judges.rendering import Renderer
from cac_reward.questions import FINDINGS_PREFIX
from cac_reward.report import TimeWindow
from cac_reward.scorer import CaCScorer
from cac_reward.training import grpo
from cac_reward.training.grpo import JudgeGRPOTrainer, count_questions
from cac_reward.training.models import load_pupil
from cac_reward.training.stages import _source, _trainer, run_stage
from cac_reward.training.stopping import StopRequest
from tests.killing import train_apart
from tests.tiny_judge import build_tiny_judge
from tests.tiny_stage import CALL, CLEAN, history, tiny_stage, weights

FINDINGS = (
    '{"findings": [{"type": "vanish", "window": [0.25, 1.00], "boxes": [{"time": 0.25, '
    '"box": [100, 100, 500, 500]}], "severity": 2, "why": ""}]}\nVerdict: anomalous'
)
RUBBISH = "Judge. Judge."
REWARDS = {"accuracy": 1.0, "temporal_iou": 1.0, "format": 0.5}
END = "<|im_end|>"


class Script:
    """Plays answers in the place of the judge's own: for each turn, one text of each answer."""

    def __init__(self, *turns: Sequence[str]) -> None:
        self.turns = list(turns)
        self.asked: list[dict[str, Any]] = []

    def play(self, trainer: Any, ids: Any, images: Any, fields: Any, *_: Any, **__: Any) -> Any:
        self.asked.append({"ids": ids, "images": images, "fields": fields})
        texts = self.turns[(len(self.asked) - 1) % len(self.turns)]
        assert len(texts) == len(ids)
        tokenizer = trainer.processing_class.tokenizer
        return [tokenizer(text)["input_ids"] for text in texts], None


def scripted(monkeypatch: pytest.MonkeyPatch, *turns: Sequence[str]) -> Script:
    script = Script(*turns)
    monkeypatch.setattr(
        JudgeGRPOTrainer, "_generate_single_turn", lambda *a, **b: script.play(*a, **b)
    )
    return script


def trainer_of(judge: Path, clips: Path, output: Path, **settings: Any) -> Any:
    """A trainer that has not begun."""
    stage = tiny_stage(judge, clips, output, **_grpo(settings))
    pupil = load_pupil(stage, "cpu")
    return _trainer(stage, pupil, _source(stage, pupil, 1), StopRequest())


def _grpo(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "trainer": "grpo",
        "rewards": REWARDS,
        "rollout": {"group": 2, "max_call_tokens": 8, "max_answer_tokens": 8},
        **settings,
    }


def scored(trainer: Any, *numbers: int) -> dict[str, Any]:
    """What TRL makes of the answers to these questions."""
    trainer.model.train()
    prompt = [{"role": "user", "content": "clip"}]
    return trainer._generate_and_score_completions(
        [{"lesson": number, "prompt": prompt} for number in numbers]
    )


def as_inference_reads(
    folder: Path, trainer: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[Tensor]]:
    """Tokens and frames of turn 2 as `CaCScorer` puts them, before the findings begin."""
    judge = LocalJudge.from_pretrained(folder).asked_as(settings=trainer.pupil.settings)
    conversations = []

    def generate(self: Any, asked: Any, *, prefix: str, **_: Any) -> list[str]:
        if prefix != FINDINGS_PREFIX:
            return [write_tool_call([TimeWindow(0.25, 1.0)], judge.family.call_format)]
        conversations.extend(asked)
        return [RUBBISH]

    with monkeypatch.context() as patched:
        patched.setattr(LocalJudge, "generate", generate)
        patched.setattr(
            LocalJudge, "choice_log_probs", lambda *a, **b: torch.tensor([[-9.0, 0.0, -9.0]])
        )
        seen = trainer.source.draw(number).seen
        CaCScorer(judge).inspect(seen.frames[None].float() / 255, fps=seen.fps)
    (read,) = trainer.encoder.renderer.tokenize(conversations, [""], judge.tools)
    return read.tokens, read.frames


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_both_turns_are_what_inference_reads_and_only_its_own_words_count(
    family: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny_judge(tmp_path / "judge", family=family)
    trainer = trainer_of(folder, clips, tmp_path / "out")
    asked = write_tool_call([TimeWindow(0.25, 1.0)], trainer.pupil.family.call_format)
    scripted(monkeypatch, [CLEAN + END, asked + END], [FINDINGS + END])
    out = scored(trainer, 1, 1)
    tokenizer = trainer.processing_class.tokenizer
    clean, call, findings = (
        tokenizer(text + END)["input_ids"] for text in (CLEAN, asked, FINDINGS)
    )

    read, frames = as_inference_reads(folder, trainer, 1, monkeypatch)
    ids = [out["prompt_ids"][1][out["prompt_mask"][1] > 0].tolist()]
    ids.append(out["completion_ids"][1][out["completion_mask"][1] > 0].tolist())
    assert ids[0] + ids[1] == read + findings
    assert ids[1][: len(call)] == call
    mask = out["tool_mask"][1][out["completion_mask"][1] > 0].tolist()
    shown = len(ids[1]) - len(call) - len(findings)
    assert shown > 0
    assert mask == [1] * len(call) + [0] * shown + [1] * len(findings)

    short = out["completion_mask"][0] > 0
    assert out["completion_ids"][0][short].tolist() == clean
    assert out["tool_mask"][0][short].tolist() == [1] * len(clean)

    # The pictures of the first answer, then of the second, each in the order of its places.
    assert out["num_images"] == [4, len(frames)]
    expected = trainer.processing_class.image_processor(
        images=[*frames[:4], *frames], do_resize=False, do_rescale=False, return_tensors="pt"
    )
    torch.testing.assert_close(out["pixel_values"], expected["pixel_values"])
    assert out["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    image = trainer.model.config.image_token_id
    whole = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    assert torch.equal(out["mm_token_type_ids"], (whole == image).long())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What TRL learns from, batch by batch."""
    outputs: list[dict[str, Any]] = []
    score = JudgeGRPOTrainer._generate_and_score_completions

    def record(self: Any, inputs: Any) -> dict[str, Any]:
        outputs.append(score(self, inputs))
        return outputs[-1]

    monkeypatch.setattr(JudgeGRPOTrainer, "_generate_and_score_completions", record)
    return outputs


def token_log_probs(model: Any, out: dict[str, Any]) -> list[Tensor]:
    """Of the judge's own tokens of each answer, read one at a time by stock transformers."""
    found = []
    patches = out["image_grid_thw"].prod(1).tolist()
    pictures, grids = out["pixel_values"].split(patches), out["image_grid_thw"]
    first = 0
    for row, count in enumerate(out["num_images"]):
        kept = torch.cat([out["prompt_mask"][row], out["completion_mask"][row]]) > 0
        tokens = torch.cat([out["prompt_ids"][row], out["completion_ids"][row]])[kept][None]
        own = torch.cat([out["prompt_mask"][row] * 0, out["tool_mask"][row]])[kept] > 0
        logits = model(
            input_ids=tokens,
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
            pixel_values=torch.cat(pictures[first : first + count]),
            image_grid_thw=grids[first : first + count],
        ).logits
        first += count
        chances = logits[0, :-1].float().log_softmax(-1)
        each = chances[range(len(chances)), tokens[0, 1:]]
        found.append(each[own[1:]])
    return found


def clip_numbers(trainer: Any, verdict: str) -> list[int]:
    source = trainer.source
    return [
        number
        for number in range(len(source))
        if source.store.annotation(int(source.clips[number])).verdict == verdict
    ]


def test_loss_and_gradient_are_those_of_the_formula(
    judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any, recorded: Any
) -> None:
    scripted(monkeypatch, [CLEAN + END, CALL + END], [FINDINGS + END])
    stage = tiny_stage(judge, clean_clips, tmp_path, **_grpo({"updates": 1}))
    run_stage(stage)
    (logged,) = history(tmp_path, key="reward")
    # A clean clip: the first answer has everything, the second its form alone, 0.5 of 2.5.
    assert logged["reward"] == pytest.approx(0.6)
    assert logged["rewards/accuracy"] == logged["rewards/temporal_iou"] == 0.5
    assert logged["rewards/format"] == 1
    assert (logged["groups/tied"], logged["groups/failed"], logged["answers/failed"]) == (0, 0, 0)
    assert logged["tools/call_frequency"] == 0.5

    model = AutoModelForImageTextToText.from_pretrained(judge)
    model.model.visual.requires_grad_(False)
    own = token_log_probs(model, recorded[0])
    spread = torch.tensor([1.0, 0.2]).std()
    advantages = [0.4 / (spread + 1e-4), -0.4 / (spread + 1e-4)]
    count = sum(map(len, own))
    values = [
        -(one.exp() / one.detach().exp() * advantage).sum() / count
        for one, advantage in zip(own, advantages, strict=True)
    ]
    loss = sum(values)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    norm = torch.stack([one.grad.norm() for one in model.parameters() if one.grad is not None])
    assert logged["grad_norm"] == pytest.approx(norm.norm().item(), rel=1e-3)


@pytest.mark.parametrize("adapted", [False, True])
def test_divergence_is_measured_from_where_the_stage_began(
    adapted: bool, judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any, recorded: Any
) -> None:
    """For an adapter that goes on learning that is the adapter as it came, not its base."""
    start = judge
    if adapted:
        lora = {"rank": 2, "alpha": 8}
        optimizer = {"learning_rate": 0.05}
        first = tiny_stage(
            judge, clean_clips, tmp_path / "0", model={"lora": lora}, optimizer=optimizer
        )
        start = run_stage(first).judge
    scripted(monkeypatch, [CLEAN + END, CALL + END], [FINDINGS + END])
    settings = {"grpo": {"kl_weight": 0.1}, "updates": 2, "save_every": 1, "keep": 2}
    settings["optimizer"] = {"learning_rate": 0.01, "schedule": "constant"}
    result = run_stage(tiny_stage(start, clean_clips, tmp_path / "1", **_grpo(settings)))
    lines = history(tmp_path / "1", key="kl")
    now, then = (
        load(find_files(folder), LoadOptions())[0]
        for folder in (tmp_path / "1" / "checkpoint-1", start)
    )
    with torch.no_grad():
        new, old = (torch.cat(token_log_probs(one, recorded[1])) for one in (now, then))
    divergence = ((old - new).exp() - (old - new) - 1).mean()
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert divergence > 1e-3
    assert lines[1]["kl"] == pytest.approx(divergence.item(), rel=1e-2)
    # The reference is no part of what is handed on.
    assert not list(result.judge.glob("*/adapter_model.safetensors"))


def test_a_group_without_one_readable_answer_moves_nothing_and_is_counted(
    judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any, recorded: Any
) -> None:
    """Neither does the divergence from the reference; the group beside it learns as ever."""
    some = [RUBBISH + END, RUBBISH + END, CLEAN + END, RUBBISH + END]
    scripted(monkeypatch, [RUBBISH + END] * 4, some)
    settings = {"grpo": {"kl_weight": 0.1}, "updates": 2, "batch": 4, "save_every": 1}
    settings["optimizer"] = {"learning_rate": 0.01, "schedule": "constant"}
    run_stage(tiny_stage(judge, clean_clips, tmp_path, **_grpo(settings)))
    nothing, half = history(tmp_path, key="groups/failed")
    assert (nothing["groups/failed"], nothing["groups/tied"]) == (1, 0)
    assert nothing["answers/failed"] == 1
    assert nothing["grad_norm"] == 0
    assert nothing["reward"] is None
    before, after = weights(judge), weights(tmp_path / "checkpoint-1")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert half["groups/failed"] == 0.5
    assert half["answers/failed"] == 0.75
    assert half["reward"] == pytest.approx(0.5)
    assert half["grad_norm"] > 0
    assert recorded[1]["tool_mask"][:2].sum() == 0
    assert recorded[1]["advantages"].tolist() == pytest.approx([0, 0, 0.7070, -0.7070], rel=1e-3)


def test_a_group_whose_answers_are_equally_good_is_counted_as_tied(
    judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    scripted(monkeypatch, [CLEAN + END] * 4)
    run_stage(tiny_stage(judge, clean_clips, tmp_path, **_grpo({"batch": 4, "updates": 1})))
    (line,) = history(tmp_path, key="groups/tied")
    assert (line["groups/tied"], line["groups/failed"], line["grad_norm"]) == (1, 0, 0)


@pytest.mark.parametrize("reward", [1 / 6, 0.7, 0.85])
def test_a_tie_is_exactly_0_whatever_the_reward(
    reward: float, judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any, recorded: Any
) -> None:
    """TRL's means in float32 leave 1e-4 of it, which a fresh AdamW makes a whole step of."""
    turns = [[CALL + END] * 8, [FINDINGS + END] * 8]
    scripted(monkeypatch, *turns)
    # A clean clip that is called anomalous has its form alone.
    settings: dict[str, Any] = {"rewards": {"accuracy": 1 - reward, "format": reward}}
    settings |= {"batch": 8, "updates": 1, "save_every": 1}
    settings["rollout"] = {"group": 8, "max_call_tokens": 8, "max_answer_tokens": 8}
    run_stage(tiny_stage(judge, clean_clips, tmp_path, **_grpo(settings)))
    assert recorded[0]["advantages"].tolist() == [0.0] * 8
    (line,) = history(tmp_path, key="reward")
    assert line["reward"] == pytest.approx(reward)
    assert (line["groups/tied"], line["grad_norm"]) == (1, 0)
    before, after = weights(judge), weights(tmp_path / "checkpoint-1")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ties_are_those_of_the_own_answers_on_each_of_two_processes(
    judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Three groups of 8 on two processes of 12 answers; the first and the last are ties."""
    turns = [[CALL + END] * 8 + [CLEAN + END] * 2 + [CALL + END] * 2, [FINDINGS + END] * 10]
    score = JudgeGRPOTrainer._generate_and_score_completions

    def play(trainer: Any, ids: Any, *_: Any, **__: Any) -> Any:
        texts = turns[len(ids) != 12]
        if trainer.accelerator.process_index:
            texts = texts[::-1]
        return [trainer.processing_class.tokenizer(text)["input_ids"] for text in texts], None

    def record(trainer: Any, inputs: Any) -> dict[str, Any]:
        out = score(trainer, inputs)
        rank = trainer.accelerator.process_index
        (tmp_path / f"{rank}.json").write_text(json.dumps(out["advantages"].tolist()))
        return out

    monkeypatch.setattr(JudgeGRPOTrainer, "_generate_single_turn", play)
    monkeypatch.setattr(JudgeGRPOTrainer, "_generate_and_score_completions", record)
    settings: dict[str, Any] = {"rewards": {"accuracy": 0.3, "format": 0.7}, "updates": 1}
    settings |= {"batch": 12, "rollout": {"group": 8}}
    stage = tiny_stage(judge, clean_clips, tmp_path / "out", **_grpo(settings))
    assert train_apart(stage, processes=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[:8] == [0.0] * 8
    assert second[4:] == [0.0] * 8
    assert first[8:] == second[3::-1]
    assert all(abs(one) > 0.5 for one in first[8:])


@pytest.mark.parametrize("tied", [False, True])
def test_answers_that_move_nothing_are_not_passed(
    tied: bool, judge: Path, clean_clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The weights are those of passing all of them; pictures stay with their answers."""
    turns = [[CLEAN + END] * 2 + [CALL + END] * 2, [FINDINGS + END, RUBBISH + END]]
    if tied:
        turns = [[CLEAN + END] * 4]
    passed: list[int] = []
    forward = JudgeGRPOTrainer._get_per_token_logps_and_entropies

    def counting(trainer: Any, model: Any, ids: Tensor, *more: Any, **named: Any) -> Any:
        passed.append(len(ids))
        return forward(trainer, model, ids, *more, **named)

    monkeypatch.setattr(JudgeGRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    after = []
    for name, losses in (("some", grpo.SUMMED_LOSSES), ("all", ())):
        monkeypatch.setattr(grpo, "SUMMED_LOSSES", losses)
        scripted(monkeypatch, *turns)
        settings = _grpo({"updates": 2, "batch": 4, "rewards": {"accuracy": 1.0, "format": 1.0}})
        run_stage(tiny_stage(judge, clean_clips, tmp_path / name, **settings))
        after.append((history(tmp_path / name, key="reward"), weights(tmp_path / name / "judge")))
    assert passed == [1, 1, 4, 4] if tied else [2, 2, 4, 4]
    (lines, found), (all_lines, expected) = after
    for line, other in zip(lines, all_lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (line["grad_norm"] > 1e-3) != tied
    for name, value in expected.items():
        # Adam makes a tenth of its step, 1e-3, of what differs where a gradient is next to none.
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lesson", "right", "wrong", "rewards", "expected"),
    [
        ("qa", "{answer}", "D", {"question_answer": 1.0, "format": 1.0}, (1.0, 0.0)),
        ("classification", "whole", "vanish", {"question_answer": 1.0}, (1.0, 0.0)),
        ("grounding", "Normal", "Anomaly", {"grounding_iou": 1.0}, (1.0, 0.0)),
    ],
)
def test_tasks_of_one_turn_learn_from_their_rewards(
    lesson: str,
    right: str,
    wrong: str,
    rewards: dict[str, float],
    expected: tuple[float, float],
    judge: Path,
    clean_clips: Path,
    tmp_path: Path,
    monkeypatch: Any,
    recorded: Any,
) -> None:
    settings: dict[str, Any] = {"lessons": {lesson: 1.0}, "rewards": rewards, "updates": 1}
    settings["options"] = {"thinking": 0.0}
    if lesson == "classification":
        settings["classes"] = ["whole", "vanish", "teleport"]
    trainer = trainer_of(judge, clean_clips, tmp_path / "plan", **settings)
    clip = trainer.source.draw(0).seen.clip
    tails = {"Normal": "<glue>[-1.0, -1.0]</glue>", "Anomaly": "<glue>[0.0, 0.5]</glue>"}
    texts = [
        f"<answer>{one.format(answer=clip.answer)}</answer>{tails.get(one, '')}{END}"
        for one in (right, wrong)
    ]
    script = scripted(monkeypatch, texts)
    run_stage(tiny_stage(judge, clean_clips, tmp_path / "out", **_grpo(settings)))
    (line,) = history(tmp_path / "out", key="reward")
    assert line[f"rewards/{next(iter(rewards))}"] == pytest.approx(sum(expected) / 2)
    assert recorded[0]["advantages"].tolist() == pytest.approx([0.7070, -0.7070], rel=1e-3)
    assert len(script.asked) == 1
    assert torch.all(recorded[0]["tool_mask"] == 1)


def test_a_call_that_was_cut_off_is_not_answered(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = trainer_of(judge, clips, tmp_path)
    scripted(monkeypatch, [CALL, CALL + " "])
    out = scored(trainer, 0, 0)
    assert out["num_images"] == [4, 4]
    assert all(one.failed for one in trainer._rollouts)


def test_it_comes_to_prefer_what_is_rewarded(
    judge: Path, clips: Path, clean_clips: Path, tmp_path: Path
) -> None:
    """Taught to call more often than to clear, it learns on clean clips alone to clear."""
    first = tiny_stage(
        judge,
        clips,
        tmp_path / "sft",
        ["data.anomalous_share=0.7"],
        lessons={"scan": 1.0},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        **{"updates": 24, "batch": 4, "save_every": 24},
    )
    settings: dict[str, Any] = {"updates": 6, "batch": 16, "save_every": 6}
    settings["rewards"] = {"accuracy": 1.0}
    settings["rollout"] = {"group": 8, "max_call_tokens": 24, "max_answer_tokens": 1}
    settings["optimizer"] = {"learning_rate": 1e-2, "schedule": "constant"}
    taught = run_stage(first).judge
    run_stage(tiny_stage(taught, clean_clips, tmp_path / "grpo", **_grpo(settings)))
    shares = [line["rewards/accuracy"] for line in history(tmp_path / "grpo", key="reward")]
    assert sum(shares[-3:]) / 3 > sum(shares[:2]) / 2 + 0.3, shares


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 3}, r"must be a multiple of rollout.group 2, got 3 \* 1 \* 1"),
        (
            {"batch": 1, "per_update": 3},
            "per_update must be a multiple of rollout.group 2, got 3; set per_update=4",
        ),
        (
            {"grpo": {"updates_per_rollout": 2}, "save_every": 3},
            "save_every must be a multiple of grpo.updates_per_rollout 2, got 3",
        ),
        (
            {"grpo": {"updates_per_rollout": 2}, "evaluation": {"every": 5}},
            "evaluation.every must be a multiple of grpo.updates_per_rollout 2, got 5",
        ),
    ],
)
def test_groups_and_sets_of_answers_stay_whole(
    settings: dict[str, Any], message: str, judge: Path, clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage(tiny_stage(judge, clips, tmp_path, **_grpo(settings)))


def test_no_more_questions_are_planned_than_are_asked(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    settings = {"updates": 5, "batch": 4, "accumulation": 3, "grpo": {"updates_per_rollout": 2}}
    stage = tiny_stage(judge, clips, tmp_path, **_grpo(settings))
    # 3 sets of answers, of 4 * 3 * 2 / 2 questions each, on two processes.
    assert count_questions(stage, 2) == 36
    settings = {"updates": 5, "batch": 2, "per_update": 8}
    stage = tiny_stage(judge, clips, tmp_path, **_grpo(settings))
    assert [count_questions(stage, processes) for processes in (1, 2, 4)] == [20, 20, 20]


def test_several_updates_on_one_set_of_answers(
    judge: Path, clips: Path, tmp_path: Path, recorded: Any, monkeypatch: Any
) -> None:
    scripted(monkeypatch, [CLEAN + END, CALL + END] * 2, [FINDINGS + END] * 2)
    settings = {"updates": 4, "accumulation": 2, "grpo": {"updates_per_rollout": 2}}
    run_stage(tiny_stage(judge, clips, tmp_path, **_grpo(settings)))
    assert len(recorded) == 2
    assert len(history(tmp_path)) == 4
    assert recorded[0]["completion_ids"].shape[0] == 4


def test_vllm_is_asked_for_by_name_where_it_is_missing(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    stage = tiny_stage(judge, clips, tmp_path, **_grpo({"rollout": {"group": 2, "vllm": True}}))
    with pytest.raises(ImportError, match="rollout.vllm needs vllm; install it with: pip install"):
        run_stage(stage)


def test_a_template_that_rewrites_the_first_turn_is_refused(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = trainer_of(judge, clips, tmp_path)
    scripted(monkeypatch, [CALL + END] * 2, [FINDINGS + END] * 2)
    plain = Renderer.render

    def rewriting(self: Any, conversation: Any, tools: Any, **more: Any) -> str:
        return plain(self, conversation, tools, **more).replace("<tool_call>", "<tool_call> ")

    monkeypatch.setattr(Renderer, "render", rewriting)
    with pytest.raises(ValueError, match="family qwen3_vl that writes it otherwise .* with 'sft'"):
        scored(trainer, 0, 0)


def test_a_turn_that_does_not_end_by_itself_is_no_answer(
    clips: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(judge, clips, tmp_path / "out")
    whole, cut = CALL + END, CALL
    scripted(monkeypatch, [CLEAN, CLEAN + END], [])
    scored(trainer, 0, 0)
    assert [one.failed for one in trainer._rollouts] == [True, False]
    scripted(monkeypatch, [cut, whole], [FINDINGS])
    scored(trainer, 1, 1)
    assert [one.failed for one in trainer._rollouts] == [True, True]
    assert [bool(one.windows) for one in trainer._rollouts] == [False, True]
