"""A short run in which all weights of a tiny Wan learn, for tests of what processes share out."""

from pathlib import Path

from torch import Tensor

from diffusion_rl.configuration import RunSettings, build
from tests.tiny_wan import save_tiny_wan


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    return videos[:, :, 0].mean((1, 2, 3))


def full_run(folder: Path) -> RunSettings:
    """Its settings; everything of it lies in a folder."""
    (folder / "prompts.txt").write_text("a red circle\nthe blue square\n")
    size = {"height": 16, "width": 16, "num_frames": 5, "fps": 8.0, "max_sequence_length": 12}
    return build(
        {
            "generator": {"path": str(save_tiny_wan(folder / "wan")), **size},
            "full": {},
            "algorithm": {"name": "nft", "kl_weight": 0.1},
            "rollout": {
                **{"num_inference_steps": 3, "prompts_per_update": 1, "videos_per_prompt": 5},
                "micro_batch": 1,
            },
            "optimizer": {"learning_rate": 3e-4, "average_decay": 0.9},
            "rewards": [{"name": "red", "target": f"{__name__}:redness"}],
            "prompts": str(folder / "prompts.txt"),
            "updates": 3,
            "save_every": 2,
            "output": str(folder / "run"),
        }
    )
