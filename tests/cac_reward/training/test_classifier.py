"""The classifier at work: what its heads say equals an independent reading of the same states."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cac_reward.report import TimeWindow
from cac_reward.training.classifier import Classified, Classifier
from cac_reward.training.clips import ClipStore
from cac_reward.training.heads import HEADS_FILE
from cac_reward.training.stages import run_stage
from tests.tiny_stage import measures_of_heads, tiny_stage

HEADS = {"words": 0.0, "frames": 1.0, "clip": 1.0}


@pytest.fixture(scope="module")
def trained(judge: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads on frozen features, after a short warm-up."""
    stage = tiny_stage(
        judge,
        clips,
        tmp_path_factory.mktemp("classifier"),
        lessons={"scan": 1.0},
        loss=HEADS,
        model={"learns": "heads"},
        optimizer={"learning_rate": 0.05},
        updates=40,
        batch=8,
        save_every=40,
    )
    return run_stage(stage).judge


def test_frames_and_clip_are_read_off_the_states_behind_the_frames(
    trained: Path, clips: Path
) -> None:
    store = ClipStore([clips], split=None)
    video = store.video(1, store.annotation(1))
    found = Classifier.from_pretrained(trained).classify(video.frames, video.fps)
    model = AutoModelForImageTextToText.from_pretrained(trained)
    processor = AutoProcessor.from_pretrained(trained)
    small = torch.nn.functional.interpolate(
        video.frames[list(found.indices)].float() / 255,
        size=(16, 16),
        mode="bilinear",
        antialias=True,
    )
    small = (small * 255).round() / 255
    stamps = "".join(
        f"<{index / video.fps:.2f} seconds><|vision_start|><|image_pad|><|vision_end|>"
        for index in found.indices
    )
    inputs = processor(
        text=[f"<|im_start|>user\n{stamps}Scan.<|im_end|>\n<|im_start|>assistant\n"],
        images=list(small),
        do_rescale=False,
        do_resize=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    ends = inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    heads = Classifier.from_pretrained(trained).heads
    logits = states[ends] @ heads.frame.weight[0] + heads.frame.bias[0]
    torch.testing.assert_close(found.frames, torch.sigmoid(logits), atol=1e-5, rtol=1e-5)
    clip = states[ends][-1] @ heads.clip.weight[0] + heads.clip.bias[0]
    assert found.p_anomalous == pytest.approx(torch.sigmoid(clip).item(), abs=1e-5)


def test_a_warm_up_makes_broken_frames_stand_out(trained: Path, clips: Path) -> None:
    measured = measures_of_heads(trained, clips)
    assert measured["frame.roc_auc"] > 0.7
    assert measured["clip.roc_auc"] > 0.7


def test_windows_are_stretches_of_frames_above_the_threshold() -> None:
    found = Classified(0.7, (0, 2, 4, 6), torch.tensor([0.1, 0.9, 0.6, 0.2]))
    assert found.windows(8, 4.0) == [TimeWindow(0.5, 1.5)]
    assert found.windows(8, 4.0, threshold=0.7) == [TimeWindow(0.5, 1.0)]
    assert found.windows(8, 4.0, threshold=0.95) == []
    last = Classified(0.7, (0, 2, 4, 6), torch.tensor([0.9, 0.1, 0.1, 0.9]))
    assert last.windows(8, 4.0) == [TimeWindow(0.0, 0.5), TimeWindow(1.5, 2.0)]


def test_a_judge_without_heads_is_refused(judge: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"must have {HEADS_FILE}, got none in .*; train a"):
        Classifier.from_pretrained(judge)
