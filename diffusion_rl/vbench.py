"""Videos as VBench looks for them, so that it runs on them in its own environment.

VBench's standard mode reads `<prompt>-<index>.mp4` of its own prompts, five of each; its custom
mode takes any folder of videos with a JSON of their prompts by file name (`evaluate.py
--mode=custom_input --prompt_file`). Both are written: a folder a side, and a JSON beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffusion_rl.tracking import write_video
from diffusion_rl.whole_files import write_whole

LONGEST = 255
"""Bytes of a file's name on the usual file systems."""
STANDARD = 5
"""Videos of a prompt that the standard mode reads."""
FORBIDDEN = "/\0"


class VBenchFolder:
    """The videos of one side, as they come; written again, they replace those of the same name.

    Args:
        folder: gets `<side>/<prompt>-<index>.mp4` and `<side>_prompts.json`.
        side: name of the generator.
    """

    def __init__(self, folder: str | Path, side: str) -> None:
        self.videos = Path(folder) / side
        self.prompt_file = Path(folder) / f"{side}_prompts.json"
        self.videos.mkdir(parents=True, exist_ok=True)
        self.prompts: dict[str, str] = {}

    def add(self, prompts: Sequence[str], videos: Tensor | None, fps: float) -> None:
        """Write the next videos [B F C H W] in [0, 1]; None where they are there already."""
        counts = Counter(self.prompts.values())
        for row, prompt in enumerate(prompts):
            name = vbench_name(prompt, counts[prompt])
            counts[prompt] += 1
            self.prompts[name] = prompt
            if videos is not None:
                # The suffix chooses the format, so the partial name ends in it too.
                partial = self.videos.parent / f".partial-{self.videos.name}.mp4"
                write_video(partial, videos[row], fps)
                os.replace(partial, self.videos / name)

    def has(self, prompts: Sequence[str]) -> bool:
        """Whether the files of the next prompts are all there."""
        counts = Counter(self.prompts.values())
        for prompt in prompts:
            if not (self.videos / vbench_name(prompt, counts[prompt])).is_file():
                return False
            counts[prompt] += 1
        return True

    def close(self) -> list[str]:
        """Write the JSON; returns what the standard mode will not find, a sentence each."""
        text = json.dumps(self.prompts, indent=2, ensure_ascii=False)
        write_whole(self.prompt_file, text + "\n")
        counts = Counter(self.prompts.values())
        renamed = [text for text in counts if vbench_name(text, 0) != f"{text}-0.mp4"]
        few = [text for text, count in counts.items() if count != STANDARD]
        notes = []
        if renamed:
            notes.append(
                f"{len(renamed)} prompts are no file names (longer than {LONGEST} bytes, or with a "
                f"'/') and are shortened, the first: {renamed[0][:60]!r}; only custom_input with "
                f"--prompt_file {self.prompt_file.name} finds them"
            )
        if few:
            notes.append(
                f"{len(few)} of {len(counts)} prompts have not the {STANDARD} videos that VBench's "
                f"standard mode reads; --videos-per-prompt {STANDARD} makes them"
            )
        return notes


def vbench_name(prompt: str, index: int) -> str:
    """`<prompt>-<index>.mp4`; of a prompt that no file can be called, its beginning and a hash."""
    end = f"-{index}.mp4"
    fits = len((prompt + end).encode()) <= LONGEST
    if fits and not any(mark in prompt for mark in FORBIDDEN):
        return prompt + end
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    for one in FORBIDDEN:
        prompt = prompt.replace(one, "_")
    room = LONGEST - len(f" {mark}{end}".encode())
    start = prompt.encode()[:room].decode(errors="ignore")
    return f"{start} {mark}{end}"
