"""Learning from written answers: the loss against plain transformers, and what may learn at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from cac_reward.frames import JudgeSettings
from cac_reward.judges.families import FAMILIES
from cac_reward.training.clips import ClipStore
from cac_reward.training.lessons import Lesson, LessonOptions, View, Words
from cac_reward.training.settings import LossSettings, StageSettings
from cac_reward.training.sft import head_losses
from cac_reward.training.source import LessonPlan, LessonSource
from cac_reward.training.stages import run_stage
from tests.killing import train_apart
from tests.tiny_judge import build_tiny_judge
from tests.tiny_stage import history, sharpen, tiny_stage, weights

HEADS_FILE = "cac_heads.safetensors"


def test_one_process_and_two_learn_the_same_of_as_many_lessons(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    """Where `per_update` says how many, in place of `accumulation`."""
    one, two, more = (
        tiny_stage(judge, clips, tmp_path / name, batch=1, **settings)
        for name, settings in (
            ("one", {"per_update": 4}),
            ("two", {"per_update": 4}),
            ("more", {"accumulation": 4}),
        )
    )
    for stage, processes in ((one, 1), (two, 2), (more, 2)):
        assert train_apart(stage, processes=processes) == [0] * processes
    steps, other, larger = (
        torch.tensor([[line["loss"], line["grad_norm"]] for line in history(tmp_path / name)])
        for name in ("one", "two", "more")
    )
    assert len(steps) == 4
    torch.testing.assert_close(steps, other, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(steps, larger, rtol=1e-3, atol=1e-6)
    expected, found = (weights(tmp_path / name / "judge") for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


def lessons_of(stage: StageSettings, family: str, factor: int, count: int) -> list[Lesson]:
    """What a stage teaches, in its order."""
    view = View(stage.judge.over(JudgeSettings()), FAMILIES[family], factor)
    update = stage.batch * stage.accumulation
    plan = LessonPlan(shares=stage.lessons, count=count, seed=stage.seed, update=update)
    source = LessonSource(
        ClipStore(stage.data.train, split=None),
        view,
        plan,
        LessonOptions.build(stage.options),
    )
    return [source.draw(number).write() for number in range(count)]


def read_plainly(model: Any, processor: Any, lesson: Lesson, turn: int) -> tuple[Tensor, Any]:
    """Logits and ids of a lesson up to one turn of the judge, with stock transformers calls."""
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    messages = [
        {
            "role": "assistant" if isinstance(one, Words) else one.role,
            "content": [{"type": "text", "text": one.text}]
            if isinstance(one, Words)
            else [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in one.content
            ],
        }
        for one in lesson.messages[: turn + 1]
    ]
    frames = [
        frame
        for one in lesson.messages[:turn]
        if not isinstance(one, Words)
        for frame in one.frames
    ]
    shown = pictures(images=frames, do_resize=False, do_rescale=False, return_tensors="pt")
    text = processor.apply_chat_template(
        messages[:turn], add_generation_prompt=True, tokenize=False
    )
    for grid in shown["image_grid_thw"]:
        count = int(grid.prod()) // pictures.merge_size**2
        text = text.replace(processor.image_token, "<|placeholder|>" * count, 1)
    text = text.replace("<|placeholder|>", processor.image_token)
    ids = tokenizer(text)["input_ids"]
    return ids, shown


def words_loss(
    model: Any, processor: Any, lessons: Sequence[Lesson], decisive_weight: float = 1.0
) -> Tensor:
    """The weighted mean of -log p of the judge's words, one sequence at a time."""
    losses, weighed = [], []
    for lesson in lessons:
        for turn, words in enumerate(lesson.messages):
            if not isinstance(words, Words) or not words.weights:
                continue
            ids, shown = read_plainly(model, processor, lesson, turn)
            answer: list[int] = []
            marks: list[float] = []
            done = 0
            for start, end, decisive in words.weights:
                for text, weight in (
                    (words.text[done:start], 0.0),
                    (words.text[start:end], decisive_weight if decisive else 1.0),
                ):
                    new = processor.tokenizer(text)["input_ids"]
                    answer += new
                    marks += [weight] * len(new)
                done = end
            if words.ends:
                answer.append(processor.tokenizer.eos_token_id)
                marks.append(1.0)
            tokens = torch.tensor([ids + answer])
            logits = model(
                input_ids=tokens,
                mm_token_type_ids=(tokens == model.config.image_token_id).int(),
                **shown,
            ).logits
            chances = logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
            losses.append(-chances[range(len(answer)), answer])
            weighed.append(torch.tensor(marks))
    weight = torch.cat(weighed)
    return (torch.cat(losses) * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("family", "lessons", "decisive"),
    [
        ("qwen3_vl", {"scan": 1.0, "verdict": 1.0}, 3.0),
        ("qwen3_vl", {"inspect": 1.0, "frame": 1.0}, 1.0),
        ("qwen2_5_vl", {"scan": 1.0, "grounding": 1.0}, 2.0),
    ],
)
def test_loss_and_gradient_are_those_of_plain_transformers(
    family: str, lessons: dict[str, float], decisive: float, clips: Path, tmp_path: Path
) -> None:
    folder = sharpen(build_tiny_judge(tmp_path / "judge", family=family))
    stage = tiny_stage(
        folder,
        clips,
        tmp_path / "out",
        model={"learns": "all"},
        lessons=lessons,
        loss={"decision_words": decisive},
        options={"exact_windows": 0.5},
        accumulation=2,
        updates=1,
    )
    run_stage(stage)
    (logged,) = history(tmp_path / "out")

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    known = lessons_of(stage, family, factor, 4)
    batches = [words_loss(model, processor, known[:2], decisive)]
    batches.append(words_loss(model, processor, known[2:], decisive))
    loss = sum(batches) / 2
    assert batches[0].item() != pytest.approx(batches[1].item(), rel=1e-6)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    norm = torch.stack([one.grad.norm() for one in model.parameters() if one.grad is not None])
    assert logged["grad_norm"] == pytest.approx(norm.norm().item(), rel=1e-3)


def put_heads(folder: Path, width: int = 32) -> dict[str, Tensor]:
    """Heads that say something: fresh ones begin at zero."""
    torch.manual_seed(1)
    state = {
        f"{name}.{part}": torch.randn(shape)
        for name in ("frame", "clip")
        for part, shape in (("weight", (1, width)), ("bias", (1,)))
    }
    save_file(state, folder / HEADS_FILE)
    return state


def test_heads_learn_from_what_is_known_behind_each_frame(clips: Path, tmp_path: Path) -> None:
    folder = sharpen(build_tiny_judge(tmp_path / "judge"))
    state = put_heads(folder)
    stage = tiny_stage(
        folder,
        clips,
        tmp_path / "out",
        model={"learns": "heads"},
        lessons={"scan": 1.0},
        loss={"words": 0.0, "frames": 0.7, "clip": 2.0, "anomalous_weight": 3.0},
        batch=3,
        updates=1,
    )
    result = run_stage(stage)
    (logged,) = history(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    scores: dict[str, list[Tensor]] = {"frame": [], "clip": []}
    truth: dict[str, list[float]] = {"frame": [], "clip": []}
    for lesson in lessons_of(stage, "qwen3_vl", 8, 3):
        ids, shown = read_plainly(model, processor, lesson, len(lesson.messages) - 1)
        tokens = torch.tensor([ids])
        kinds = (tokens == model.config.image_token_id).int()
        hidden = model.model(input_ids=tokens, mm_token_type_ids=kinds, **shown).last_hidden_state
        ends = [at for at, one in enumerate(ids) if one == model.config.vision_end_token_id]
        assert len(ends) == len(lesson.frame_labels) == 4
        for name, places in (("frame", ends), ("clip", ends[-1:])):
            odds = hidden[0, places] @ state[f"{name}.weight"][0] + state[f"{name}.bias"]
            scores[name].append(odds)
        truth["frame"] += lesson.frame_labels
        truth["clip"].append(lesson.clip_label)
    assert 0 < sum(truth["frame"]) < len(truth["frame"])
    assert 0 < sum(truth["clip"]) < 3
    parts = {}
    for name in scores:
        labels = torch.tensor(truth[name])
        weight = 1 + 2 * labels
        parts[name] = cross_entropy(torch.cat(scores[name]), labels, weight, reduction="sum")
        parts[name] = parts[name] / weight.sum()
    loss = 0.7 * parts["frame"] + 2.0 * parts["clip"]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["loss_frames"] == pytest.approx(parts["frame"].item(), rel=1e-4)
    learnt = load_file(result.judge / HEADS_FILE)
    assert all(not torch.equal(learnt[name], state[name]) for name in state)
    before, after = weights(folder), weights(result.judge)
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_captions_are_learnt_beside_the_words(judge: Path, clips: Path, tmp_path: Path) -> None:
    loss = {"captions": 1.0, "caption_tokens": 3}
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    stage = tiny_stage(
        judge, clips, tmp_path, lessons={"scan": 1.0}, loss=loss, optimizer=optimizer, updates=12
    )
    result = run_stage(stage)
    heard = [line["loss_captions"] for line in history(tmp_path)]
    assert heard[-1] < 0.8 * heard[0]
    assert load_file(result.judge / HEADS_FILE)["captions.weight"].shape == (3 * 32, 32)


def test_unknown_labels_take_no_part_in_the_heads_losses() -> None:
    labels, odds = torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([0.3, 9.0, -0.2])
    loss = LossSettings(anomalous_weight=3.0)
    nothing = torch.full((2,), float("nan"))
    found = head_losses(odds, torch.zeros(2), labels, nothing, loss)
    known = cross_entropy(odds[[0, 2]], labels[[0, 2]], torch.tensor([3.0, 1.0]), reduction="sum")
    torch.testing.assert_close(found["frames"], known / 4)
    assert found["clip"] == 0


@pytest.mark.parametrize("learns", ["all", "language"])
def test_only_what_is_to_learn_moves(learns: str, judge: Path, clips: Path, tmp_path: Path) -> None:
    result = run_stage(tiny_stage(judge, clips, tmp_path, model={"learns": learns}, updates=1))
    before, after = weights(judge), weights(result.judge)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    seeing = {name for name in before if "visual" in name}
    assert moved - seeing
    assert seeing
    assert bool(moved & seeing) == (learns == "all")


def test_an_adapter_learns_beside_the_heads_and_goes_on_learning(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    """Putting an adapter on freezes all else, and 'all-linear' would mean the heads too."""
    common = {"lessons": {"scan": 1.0}, "loss": {"frames": 1.0}, "updates": 2}
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1}
    first = run_stage(tiny_stage(judge, clips, tmp_path / "1", model={"lora": lora}, **common))
    adapter = load_file(first.judge / "adapter_model.safetensors")
    heads = load_file(first.judge / HEADS_FILE)
    assert not any("cac_heads" in name or "visual" in name for name in adapter)
    assert any(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name)
    assert heads["frame.weight"].abs().max() > 0
    assert not (first.judge / "model.safetensors").exists()

    second = run_stage(tiny_stage(first.judge, clips, tmp_path / "2", **common))
    later = load_file(second.judge / "adapter_model.safetensors")
    assert later.keys() == adapter.keys()
    assert any(not torch.equal(later[name], adapter[name]) for name in adapter)
    assert not torch.equal(
        load_file(second.judge / HEADS_FILE)["frame.weight"], heads["frame.weight"]
    )


def test_muon_moves_matrices_and_adamw_the_rest(judge: Path, clips: Path, tmp_path: Path) -> None:
    optimizer = {"name": "muon", "muon_rate": 0.02, "learning_rate": 1e-3, "schedule": "constant"}
    stage = tiny_stage(judge, clips, tmp_path, optimizer=optimizer, updates=1)
    before, after = weights(judge), weights(run_stage(stage).judge)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    step = (after[name] - before[name]).norm() / before[name].numel() ** 0.5
    # Muon's update is near orthogonal, scaled to 0.2 of AdamW's typical root mean square of 1.
    assert 0.02 * 0.2 * 0.5 < step < 0.02 * 0.2 * 1.5
    name = "model.language_model.norm.weight"
    moved = (after[name] - before[name]).abs()
    torch.testing.assert_close(
        moved[moved > 0], torch.full_like(moved[moved > 0], 1e-3), rtol=1e-2, atol=0
    )


def test_it_learns_what_it_is_told(judge: Path, clips: Path, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    lessons = {"verdict": 1.0}
    stage = tiny_stage(
        judge, clips, tmp_path, lessons=lessons, optimizer=optimizer, updates=25, save_every=25
    )
    run_stage(stage)
    losses = [line["loss"] for line in history(tmp_path)]
    # Two tokens of three are always the same, the verdict is one bit: log(2) / 3 without seeing.
    assert losses[0] > 4
    assert sum(losses[-5:]) / 5 < 0.4


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"words": 1.0}, "loss.frames or loss.clip must be above 0 where model.learns is 'heads'"),
        ({"words": 1.0, "clip": 1.0}, "loss.words must be 0 where model.learns is 'heads', got 1"),
    ],
)
def test_heads_alone_need_a_loss_of_theirs(
    loss: dict[str, float], message: str, judge: Path, clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage(tiny_stage(judge, clips, tmp_path, model={"learns": "heads"}, loss=loss))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_other_families_learn_and_come_back(family: str, clips: Path, tmp_path: Path) -> None:
    folder = build_tiny_judge(tmp_path / "judge", family=family)
    stage = tiny_stage(folder, clips, tmp_path / "out", updates=2, loss={"frames": 1.0})
    result = run_stage(stage)
    assert [line["loss"] > 0 for line in history(tmp_path / "out")] == [True, True]
    before, after = weights(folder), weights(result.judge)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
