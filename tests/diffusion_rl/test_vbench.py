"""Videos by the names that VBench looks for, read back by its own rules."""

import json
import os
import re
from pathlib import Path

import av
import torch

from diffusion_rl.vbench import LONGEST, VBenchFolder, vbench_name

VIDEOS = torch.linspace(0, 1, 5 * 2 * 3 * 16 * 16).view(5, 2, 3, 16, 16)


def prompt_of(name: str) -> str:
    """VBench's rule: the stem without `-<number>` at its end."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def test_the_standard_mode_finds_five_of_each(tmp_path: Path) -> None:
    folder = VBenchFolder(tmp_path, "tuned")
    prompt = 'a 3D model, v1-2: "house".'
    folder.add([prompt] * 3, VIDEOS[:3], 8.0)
    folder.add([prompt] * 2, VIDEOS[3:], 8.0)
    assert folder.close() == []
    names = sorted(path.name for path in (tmp_path / "tuned").iterdir())
    assert names == [f"{prompt}-{index}.mp4" for index in range(5)]
    assert {prompt_of(name) for name in names} == {prompt}
    for index, name in enumerate(names):
        with av.open(str(tmp_path / "tuned" / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert abs(frames[0].mean() / 255 - VIDEOS[index, 0].mean().item()) < 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned", "tuned_prompts.json"]


def test_what_is_no_file_name_is_shortened_and_told(tmp_path: Path) -> None:
    long, slash = "ein B\u00e4r " * 60, "cats and/or dogs"
    folder = VBenchFolder(tmp_path, "base")
    folder.add([long, slash], VIDEOS[:2], 8.0)
    notes = folder.close()
    assert notes[0].startswith("2 prompts are no file names (longer than 255 bytes, or with a '/')")
    assert notes[1].startswith("2 of 2 prompts have not the 5 videos")
    prompts = json.loads((tmp_path / "base_prompts.json").read_text(encoding="utf-8"))
    assert set(prompts.values()) == {long, slash}
    for name in prompts:
        assert (tmp_path / "base" / name).is_file()
        assert len(name.encode()) <= LONGEST
    assert vbench_name(long, 0).startswith("ein B\u00e4r ein B\u00e4r")


def test_the_longest_name_that_fits_is_kept() -> None:
    for prompt in ("x" * 249, "\u00e9" * 124 + "x"):
        assert vbench_name(prompt, 0) == f"{prompt}-0.mp4"
        assert len(vbench_name(prompt, 0).encode()) == LONGEST
        longer = prompt + "y"
        assert vbench_name(longer, 0) != f"{longer}-0.mp4"
        assert len(vbench_name(longer, 0).encode()) <= LONGEST
    # What is cut alike stays apart.
    assert vbench_name("z" * 300, 0) != vbench_name("z" * 301, 0)
    assert vbench_name("a/b", 0) != vbench_name("a_b", 0)


def test_videos_that_are_there_are_counted_and_not_written(tmp_path: Path) -> None:
    first = VBenchFolder(tmp_path, "base")
    assert not first.has(["a", "a"])
    first.add(["a", "a"], VIDEOS[:2], 8.0)
    again = VBenchFolder(tmp_path, "base")
    assert again.has(["a", "a"])
    assert not again.has(["a", "a", "a"])
    again.add(["a", "a"], None, 8.0)
    assert not again.has(["a"])
    again.add(["a"], VIDEOS[2:3], 8.0)
    again.close()
    assert sorted(os.listdir(tmp_path / "base")) == ["a-0.mp4", "a-1.mp4", "a-2.mp4"]
    assert len(json.loads((tmp_path / "base_prompts.json").read_text())) == 3
