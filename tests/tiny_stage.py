"""A stage that trains a tiny judge on small clips within a second, for the tests of training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cac_reward.evaluation.measuring import evaluate
from cac_reward.evaluation.pairing import Pair, Pairing
from cac_reward.evaluation.predictions import Prediction
from cac_reward.records import ClipRecord
from cac_reward.training.classifier import Classifier
from cac_reward.training.clips import ClipStore
from cac_reward.training.settings import StageSettings, build_stage
from tests.tiny_judge import build_tiny_judge

CLEAN = "Verdict: clean"
CALL = '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.25, 1.00]]}}\n</tool_call>'
VIEW = {
    "wording": "brief",
    "scan": {"fps": 4.0, "max_frames": 4, "pixels": 256},
    "inspect": {"fps": 8.0, "max_frames": 5, "pixels": 1024, "margin_seconds": 0.125},
}
"""How the tiny judge is asked: 4 frames of 16x16, then up to 5 of 32x32."""


def tiny_stage(
    judge: Path, clips: Path, output: Path, overrides: Sequence[str] = (), **settings: Any
) -> StageSettings:
    """A stage of 4 updates on the CPU; `settings` and `overrides` change what they name."""
    tree = {
        "model": {"path": str(judge), "dtype": "float32", "gradient_checkpointing": False},
        "judge": VIEW,
        "data": {"train": [str(clips)], "workers": 0},
        "updates": 4,
        "batch": 2,
        "bf16": False,
        "save_every": 2,
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear"},
        "output": str(output),
    }
    if "lessons" not in settings:
        tree["lessons"] = {"inspect": 1.0}
    return build_stage(OmegaConf.merge(tree, settings), "a tiny stage", overrides)


def build_speaking_judge(folder: Path, **more: Any) -> Path:
    """A tiny judge whose likely answers are few tokens each, so that it learns them at once."""
    return sharpen(build_tiny_judge(folder, whole_tokens=[CLEAN, CALL], **more))


def sharpen(folder: Path, factor: float = 4.0) -> Path:
    """Larger weights, so that what a judge says depends on what it reads."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    save_file({name: _larger(one, factor) for name, one in state.items()}, file, metadata=metadata)
    return folder


def _larger(weight: Tensor, factor: float) -> Tensor:
    return weight * factor if weight.ndim > 1 else weight


def measures_of_heads(judge: Path, clips: Path) -> dict[str, float]:
    """What `evaluate` measures of a judge's heads, loaded from its folder, on all clips."""
    store = ClipStore([clips], split=None)
    known = [store.annotation(number) for number in range(len(store))]
    videos = [store.video(number, clip) for number, clip in enumerate(known)]
    pairs = []
    reports = Classifier.from_pretrained(judge).inspect(videos)
    for clip, report in zip(known, reports, strict=True):
        record = ClipRecord(path=clip.path, width=32, height=32, report=report)
        pairs.append(Pair(clip, Prediction.from_record(record)))
    measured = evaluate(Pairing(tuple(pairs), (), ()), draws=0).measurements
    return {one.name: one.estimate.value for one in measured}


def history(output: Path, *, key: str = "loss") -> list[dict[str, Any]]:
    """Lines of the last checkpoint's log that hold a key."""
    last = max(output.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))
    lines = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [line for line in lines if key in line]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
