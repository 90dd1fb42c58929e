"""What the model card says, what it keeps to itself, and how an evaluation gets into it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanPipeline

from diffusion_rl.__main__ import main
from diffusion_rl.card import BEGIN, CARD, END, public, update_card, write_card
from diffusion_rl.configuration import RunSettings, build
from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE
from diffusion_rl.page import Table
from diffusion_rl.progress import FinetuneState
from tests.tiny_wan import save_tiny_wan

STATE = FinetuneState(
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
    step=120,
    videos_generated=7680,
    reward_calls=15360,
    seconds=635.4,
)
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def settings_of(path: str = HUB, family: str = "wan", **more: Any) -> RunSettings:
    options = {"path_or_hub_id": "/home/me/judge", "api_key": "hush", "max_new_tokens": 64}
    options |= {"endpoint": "http://10.0.0.7:8000/v1"}
    size = {"height": 480, "width": 832, "num_frames": 81, "fps": 16}
    return build(
        {
            "generator": {"path": path, "family": family, "local_path": "/data/wan", **size},
            "algorithm": {"name": "nft", "kl_weight": 0.02},
            "rewards": [
                {
                    "name": "cac",
                    "target": "cac_reward:CaCScorer.from_pretrained",
                    "options": options,
                },
                {
                    "name": "far",
                    "target": "http://10.0.0.8:1/score",
                    "where": "http",
                    "weight": 0.5,
                },
            ],
            "guards": [{"statistic": "motion", "weight": 0.5}],
            "prompts": "/home/me/prompts.txt",
            "output": "/home/me/run",
            **more,
        }
    )


def test_the_card_says_what_was_done_and_not_where(tmp_path: Path) -> None:
    (tmp_path / LORA_FILE).write_bytes(b"")
    settings = settings_of(lora={"rank": 8, "alpha": 4.0})
    text = write_card(tmp_path, settings, STATE, 256).read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == HUB
    assert head["pipeline_tag"] == "text-to-video"
    assert "license" not in head
    assert "# license:" in text
    assert "81 frames of 832 x 480 pixels at 16 frames per second" in text
    assert "rank 8 and alpha 4" in text
    assert "`ffn.net.2`" in text
    assert "| `algorithm.kl_weight` | 0.02 |" in text
    assert "| cac | `cac_reward:CaCScorer.from_pretrained` | 1 | path_or_hub_id=(a local " in text
    assert "api_key=(hidden), max_new_tokens=64, endpoint=(an address)" in text
    assert "| far | (a server) | 0.5 |" in text
    assert "| `guards` motion | weight 0.5 |" in text
    for row in ("updates | 120", "prompts | 256", "videos generated | 7,680", "seconds | 635"):
        assert f"| {row} |" in text
    for private in ("/home", "/data", "10.0.0", "hush", str(tmp_path)):
        assert private not in text
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_local_base_is_not_named(tmp_path: Path) -> None:
    folder = tmp_path / "my secret model"
    folder.mkdir()
    text = write_card(tmp_path, settings_of(str(folder)), STATE, 1).read_text()
    assert "secret" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert 'from_pretrained("BASE_MODEL")' in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (HUB, HUB),
        ("/etc", "(a local folder)"),
        ("./judge", "(a local folder)"),
        ("~/judge", "(a local folder)"),
        ("C:\\judge", "(a local folder)"),
        ("/etc/hostname", "(a local file)"),
        ("https://example.com/a", "(an address)"),
        (0.5, "0.5"),
        (None, "None"),
    ],
)
def test_what_a_stranger_may_read(value: Any, shown: str) -> None:
    assert public(value) == shown


def run_code(text: str, folder: Path, base: Path) -> dict[str, Any]:
    """Run the lines that the card gives."""
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace("THIS_FOLDER", str(folder)).replace("BASE_MODEL", str(base))
    names: dict[str, Any] = {}
    exec(code, names)
    return names


CONFIG = """
generator:
  {path: wan, height: 16, width: 16, num_frames: 5, fps: 8, max_sequence_length: 12}
LEARNS
rollout: {num_inference_steps: 3, stochastic_steps: 1, prompts_per_update: 1, videos_per_prompt: 2}
rewards: [{name: red, target: "card_rewards:red"}]
prompts: prompts.txt
updates: 1
output: run
"""


@pytest.mark.parametrize(("learns", "result"), [("lora: {rank: 2}", "lora"), ("full: {}", "tuned")])
def test_a_run_ends_with_a_card_whose_lines_load_it_and_evaluate_fills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: str, result: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_tiny_wan(tmp_path / "wan")
    (tmp_path / "card_rewards.py").write_text(
        "def red(videos, prompts, *, fps):\n    return videos[:, :, 0].mean((1, 2, 3))\n"
    )
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("LEARNS", learns))
    assert main(["train", "tiny.yaml", "--traceback"]) == 0
    card = tmp_path / "run" / result / CARD
    text = card.read_text()
    names = run_code(text, card.parent, tmp_path / "wan")
    assert isinstance(names["pipeline"], WanPipeline)
    adapted = getattr(names["pipeline"].transformer, "peft_config", {})
    assert len(adapted) == (result == "lora")
    assert str(tmp_path) not in text

    card.write_text(text.replace("# license: yours", "license: mit # yours"))
    kind = "--lora" if result == "lora" else "--transformer"
    words = ["evaluate", kind, f"run/{result}", "--prompts", "prompts.txt"]
    assert main([*words, "--videos-per-prompt", "2", "--clean", "red", "--traceback"]) == 0
    updated = card.read_text()
    assert "license: mit" in updated
    assert "### Before and after" in updated
    assert "### Can the judge be fooled? (red)" in updated
    assert "2 videos a side of 1 prompts" in updated
    outside = [re.sub(f"{BEGIN}.*{END}", "", one, flags=re.DOTALL) for one in (text, updated)]
    assert outside[0].replace("# license: yours", "license: mit # yours") == outside[1]

    weights = next(card.parent.rglob("*.safetensors"))
    written = weights.stat().st_mtime_ns
    assert main(["train", "tiny.yaml", "--traceback"]) == 0  # Nothing is left to do.
    assert (card.read_text(), weights.stat().st_mtime_ns) == (updated, written)
    card.write_text(updated.replace("| updates | 1 |", "| updates | 0 |"))
    assert main(["train", "tiny.yaml", "--traceback"]) == 0  # As if stopped before it was written.
    assert card.read_text() == text
    weights.rename(weights.with_suffix(".away"))
    if result == "lora":
        assert main(["train", "tiny.yaml", "--traceback"]) == 0
        assert weights.is_file()


def test_a_later_evaluation_replaces_the_earlier_one(tmp_path: Path) -> None:
    first, second = (Table(title=name, columns=["a"], rows=[["x"]]) for name in ("One", "Two"))
    path = update_card(tmp_path, [first], "first note")
    assert path.read_text().startswith("## Evaluation\n\n" + BEGIN)
    update_card(tmp_path, [second], "second note")
    text = path.read_text()
    assert "### Two" in text
    assert "One" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    path.write_text("# Mine\n")
    update_card(tmp_path, [first], "note")
    assert path.read_text().startswith("# Mine\n\n## Evaluation\n\n")


def test_each_family_is_loaded_in_its_own_way(tmp_path: Path) -> None:
    for name in (LORA_FILE, SECOND_LORA_FILE):
        (tmp_path / name).write_bytes(b"")
    text = write_card(tmp_path, settings_of(family="wan2.2"), STATE, 1).read_text()
    assert f'weight_name="{SECOND_LORA_FILE}", load_into_transformer_2=True)' in text
    (tmp_path / SECOND_LORA_FILE).unlink()
    text = write_card(tmp_path, settings_of(family="hunyuan1.5"), STATE, 1).read_text()
    call = f'pipeline.transformer.load_lora_adapter("THIS_FOLDER", weight_name="{LORA_FILE}")'
    assert call in text
