"""The table of samplers, of the untrained generator and of a LoRA that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.algorithms import RECORDED
from benchmarks.samplers import main, places_of
from diffusion_rl.configuration import load_config
from diffusion_rl.launch import build_generator
from diffusion_rl.lora import attach_lora
from diffusion_rl.lora_files import save_lora


def test_noise_is_spread_over_the_steps() -> None:
    assert places_of(3, 7) == [0, 3, 6]
    assert places_of(7, 7) == [*range(7)]
    assert places_of(1, 7) == [0]
    assert places_of(0, 7) == []


def test_every_way_to_draw_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_config(RECORDED)
    generator = build_generator(settings.generator)
    assert settings.lora is not None
    attach_lora(generator.transformer, settings.lora)
    folder = str(save_lora(generator, tmp_path / "lora"))
    main(["--loras", folder, "--videos-per-prompt", "1", "--noise-levels", "0.7"])
    header, _, *lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in table] == [
        [weights, *way]
        for weights in ("base", folder)
        for way in (("none", ""), ("3", "0.7"), ("7", "0.7"))
    ]
    # The LoRA's second factor is 0, so that it draws what the base draws.
    assert [row[1:] for row in table[:3]] == [row[1:] for row in table[3:]]
    assert table[0][6:] == ["100%", "100%"]
    assert len({row[7] + row[3] for row in table[:3]}) > 1
    assert header.count("|") == len(table[0]) + 1


def test_what_cannot_be_drawn_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--videos-per-prompt", "0"], "--videos-per-prompt must be at least 1, got 0"),
        (["--loras", f"{tmp_path}/none"], f"--loras must be folders of LoRAs, got {tmp_path}/none"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr()
        assert message in said.err
        assert said.out == ""
