"""The model card says what was trained on what, and how good it is."""

from pathlib import Path

import yaml

from cac_reward.training.cards import CARD_FILE, write_card
from cac_reward.training.settings import StageSettings, build_stage


def stage(**more: object) -> StageSettings:
    tree = {
        "model": {"path": "a #1: judge", "lora": {"rank": 8}, "learns": "language"},
        "data": {"train": ["a.jsonl", "b.tar"], "held_out": ["c.jsonl"]},
        "lessons": {"inspect": 2, "scan": 0.5},
        "output": "out",
        "seed": 7,
        **more,
    }
    return build_stage(tree, "card")


def test_the_card_names_everything(tmp_path: Path) -> None:
    measured = {"clip.accuracy": 0.93751, "time.mean_iou": 0.5}
    write_card(tmp_path, stage(), measured, 12, 345)
    text = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["base_model"] == "a #1: judge"
    assert front["library_name"] == "transformers"
    assert "reward-model" in front["tags"]
    for line in (
        "* trainer: sft, 12 updates, seed 7",
        "* learns: language, LoRA rank 8, alpha 128",
        "* lessons: inspect 2, scan 0.5",
        "* clips: 345 of a.jsonl, b.tar",
        "On the first 256 clips of c.jsonl:",
        "| clip.accuracy | 0.9375 |",
        "| time.mean_iou | 0.5000 |",
    ):
        assert line in body.splitlines()
    assert "rewards" not in body


def test_rewards_and_no_measures(tmp_path: Path) -> None:
    rewarded = stage(trainer="grpo", rewards={"accuracy": 1}, lessons={"inspect": 1})
    write_card(tmp_path, rewarded, {}, 3, 4)
    lines = (tmp_path / CARD_FILE).read_text(encoding="utf-8").splitlines()
    assert "* rewards: accuracy 1" in lines
    assert "Nothing: no held-out clips were given." in lines
