"""Stop anywhere, go on bit for bit; and what happens when the disk does not play along."""

import errno
import json
import math
import os
import random
import shutil
import signal
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_rl.algorithms import algorithm
from diffusion_rl.checkpoint import (
    MANIFEST,
    STATE_FILE,
    STATE_TENSORS,
    best_checkpoint,
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
    take_snapshot,
)
from diffusion_rl.finetune import FinetuneSettings, FinetuneState, begin, finetune
from diffusion_rl.guards import GuardSettings
from diffusion_rl.lora import AVERAGE, OLD, TRAINED, LoraSettings, attach_lora, lora_state
from diffusion_rl.lora_files import load_lora
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import SETTINGS, GrpoSettings, NftSettings
from tests.several import run_on
from tests.toy_gaussian import LORA, ToyGenerator


def jittery(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """A reward that draws from every global random source."""
    noise = torch.rand(len(videos)) + random.random() + np.random.rand()
    return videos[:, :, 0].mean((1, 2, 3)) + 0.1 * noise


REWARD = Reward("jittery", jittery)


def settings_for(
    row: AlgorithmSettings, updates: int, average_decay: float = 0.0
) -> FinetuneSettings:
    return FinetuneSettings(
        algorithm=row,
        rollout=RolloutSettings(
            num_inference_steps=4, stochastic_steps=2, prompts_per_update=2, videos_per_prompt=4
        ),
        optimizer=OptimizerSettings(learning_rate=1e-2, average_decay=average_decay),
        guards=(GuardSettings(statistic="contrast"),),
        updates=updates,
    )


def start(settings: FinetuneSettings, seed: int = 0) -> tuple[ToyGenerator, FinetuneState]:
    generator = ToyGenerator()
    old = algorithm(settings.algorithm.name).uses_old_policy
    average = settings.optimizer.average_decay > 0
    attach_lora(generator.transformer, LORA, old_policy=old, average=average, seed=seed)
    return generator, begin(generator, settings)


def weights(generator: ToyGenerator, settings: FinetuneSettings) -> dict[str, Tensor]:
    adapters = [TRAINED]
    adapters += [OLD] if algorithm(settings.algorithm.name).uses_old_policy else []
    adapters += [AVERAGE] if settings.optimizer.average_decay else []
    return {
        f"{adapter} {name}": value
        for adapter in adapters
        for name, value in lora_state(generator.transformer, adapter).items()
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "ddpo": {"history_capacity": 12, "history_min_count": 10},
    "mix_grpo": {"window": "random", "updates_per_window": 2},
    "awm": {"inner_steps": 2, "noise_levels": 2},
}


def roll(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize(
    ("name", "average_decay"), [*((name, 0.9) for name in SETTINGS), ("grpo", 0.0), ("nft", 0.0)]
)
def test_a_killed_run_goes_on_to_the_last_bit(
    name: str, average_decay: float, tmp_path: Path
) -> None:
    """Killed with -9 within its fourth update; what the third left is all that the rest has."""
    options = OPTIONS.get(name, {})
    if "clip_range" in vars(SETTINGS[name]()):
        options = {**options, "clip_range": 0.02}
    row = SETTINGS[name](kl_weight=0.1, **options)
    whole = settings_for(row, updates=5, average_decay=average_decay)
    prompts, asked = ["plain", "bright", "plain and small"], list[list[str]]()

    def noted(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        asked.append(prompts)
        return jittery(videos, prompts, fps=fps)

    generator, state = start(whole)
    roll(7)
    expected = list(finetune(generator, [Reward("jittery", noted)], prompts, whole, state))
    assert len(set(map(str, asked))) > 1
    order = asked[3:]
    asked.clear()

    def first() -> None:
        generator, state = start(whole)
        roll(7)
        killed = Reward("jittery", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        rewards = [Reward("jittery", noted)]
        for report in finetune(generator, rewards, prompts, whole, state):
            save_checkpoint(tmp_path, take_snapshot(generator, state))
            if report.step == 3:
                rewards[0] = killed

    assert run_on(1, first) == [-signal.SIGKILL]
    roll(99)
    second, second_state = start(whole, seed=5)
    restore(second, second_state, read_checkpoint(latest_checkpoint(tmp_path)))
    assert second_state.step == 3
    assert second_state.videos_generated == expected[2].videos_generated
    assert second_state.reference_levels == state.reference_levels
    assert second_state.running_levels != {}
    assert bool(second_state.history) == (name == "ddpo")
    reports = finetune(second, [Reward("jittery", noted)], prompts, whole, second_state)
    rewards = [report.reward for report in reports]
    assert rewards == [report.reward for report in expected[3:]]
    assert asked == order
    assert second_state.history == state.history
    assert second_state.running_levels == state.running_levels
    after, before = weights(second, whole), weights(generator, whole)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[ToyGenerator, FinetuneState, Path]:
    """A run after two updates, saved after each."""
    settings = settings_for(GrpoSettings(), updates=2)
    generator, state = start(settings)
    for _ in finetune(generator, [REWARD], ["plain"], settings, state):
        save_checkpoint(tmp_path, take_snapshot(generator, state))
    return generator, state, tmp_path


def test_a_checkpoints_lora_loads_on_its_own(trained: tuple) -> None:
    generator, _, folder = trained
    fresh = ToyGenerator()
    load_lora(fresh, folder / "step-000002" / "lora")
    expected = lora_state(generator.transformer)
    found = lora_state(fresh.transformer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_snapshot_is_a_copy(trained: tuple) -> None:
    generator, state, _ = trained
    snapshot = take_snapshot(generator, state)
    before = lora_state(generator.transformer)
    for parameter in state.optimizer.param_groups[0]["params"]:
        parameter.data.add_(1.0)
    state.optimizer.state.clear()
    restore(generator, state, snapshot)
    after = lora_state(generator.transformer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(state.optimizer.state) == 2


def test_the_learning_rate_stays_that_of_the_new_settings(trained: tuple) -> None:
    _, _, folder = trained
    generator, state = start(settings_for(GrpoSettings(), updates=2))
    state.optimizer.param_groups[0]["lr"] = 5e-5
    restore(generator, state, read_checkpoint(folder / "step-000002"))
    assert state.optimizer.param_groups[0]["lr"] == 5e-5


def test_only_the_newest_checkpoints_stay(trained: tuple) -> None:
    generator, state, folder = trained
    assert [path.name for path in checkpoints(folder)] == ["step-000001", "step-000002"]
    state.step = 1_000_000
    save_checkpoint(folder, take_snapshot(generator, state))
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-1000000"]
    assert latest_checkpoint(folder) == folder / "step-1000000"
    assert latest_checkpoint(folder / "nothing") is None
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(folder, take_snapshot(generator, state), keep=0)


def test_a_step_saved_before_is_left_as_it_is(trained: tuple) -> None:
    generator, state, folder = trained
    written = (folder / "step-000002" / MANIFEST).stat().st_mtime_ns
    save_checkpoint(folder, take_snapshot(generator, state))
    assert (folder / "step-000002" / MANIFEST).stat().st_mtime_ns == written


def test_a_full_disk_loses_nothing(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, state, folder = trained
    state.step = 3
    files = []

    def full(handle: int) -> None:
        files.append(handle)
        if len(files) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = "step 3 .* could not be written .*No space left.*last complete one is .*step-000002"
    with pytest.raises(OSError, match=message) as raised:
        save_checkpoint(folder, take_snapshot(generator, state))
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    assert read_checkpoint(folder / "step-000002").step == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders_is_good_enough(
    trained: tuple, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    generator, state, folder = trained
    state.step = 3
    flush = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with pytest.raises(OSError, match="Input/o") if number == errno.EIO else nullcontext():
        save_checkpoint(folder, take_snapshot(generator, state))
    assert read_checkpoint(folder / "step-000003").step == 3


def test_a_checkpoint_appears_only_when_it_is_whole(
    trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, state, folder = trained
    state.step = 3
    whole = []

    def crash(source: Path, target: Path) -> None:
        whole.append((read_checkpoint(source).step, Path(target).exists()))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint(folder, take_snapshot(generator, state))
    assert whole == [(3, False)]
    assert latest_checkpoint(folder) == folder / "step-000002"


def test_a_save_cut_off_is_invisible_and_cleared_away(trained: tuple) -> None:
    generator, state, folder = trained
    leftover = folder / "step-000003.partial"
    leftover.mkdir()
    (leftover / STATE_FILE).write_bytes(b"half")
    assert latest_checkpoint(folder) == folder / "step-000002"
    state.step = 4
    save_checkpoint(folder, take_snapshot(generator, state))
    assert not leftover.exists()
    assert latest_checkpoint(folder) == folder / "step-000004"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (MANIFEST, None, "must be complete, got no checkpoint.json"),
        (MANIFEST, b"{", "must be complete, got a damaged .*checkpoint.json"),
        (STATE_FILE, None, r"got a damaged .*training_state.json \(0 bytes\)"),
        (STATE_TENSORS, b"half", r"got a damaged .*training_state.safetensors \(4 bytes\)"),
    ],
)
def test_a_half_written_checkpoint_is_refused_with_the_way_out(
    trained: tuple, file: str, content: bytes | None, message: str
) -> None:
    _, _, folder = trained
    path = folder / "step-000002"
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint(path)
    assert f"delete {path} to go on from {folder / 'step-000001'}" in str(raised.value)
    assert read_checkpoint(folder / "step-000001").step == 1


def test_a_checkpoint_of_another_version_is_refused(trained: tuple) -> None:
    _, _, folder = trained
    path = folder / "step-000001" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="must be of version 3, got 99 .* or --restart to set"):
        read_checkpoint(path.parent)


def test_a_checkpoint_holds_no_pickle(trained: tuple) -> None:
    _, _, folder = trained
    files = [path for path in (folder / "step-000002").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            length = int.from_bytes(path.read_bytes()[:8], "little")
            json.loads(path.read_bytes()[8 : 8 + length])


def test_the_best_checkpoint_stays_besides_the_newest(trained: tuple, tmp_path: Path) -> None:
    generator, state, _ = trained
    folder = tmp_path / "kept"
    found = []
    for step, reward in enumerate([0.1, 0.9, 0.9, math.nan, 0.2, 0.3, 1.5], start=1):
        state.step = step
        snapshot = take_snapshot(generator, state, {"reward": reward, "kl": -reward})
        save_checkpoint(folder, snapshot, keep=2, best_by="reward")
        found.append([int(path.name[5:]) for path in checkpoints(folder)])
    assert found == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [6, 7]]
    assert best_checkpoint(folder, "reward") == folder / "step-000007"
    assert best_checkpoint(folder, "kl") == folder / "step-000006"
    assert best_checkpoint(folder, "tied_share") is None
    assert read_checkpoint(folder / "step-000006").metrics == {"reward": 0.3, "kl": -0.3}
    (folder / "step-000007" / MANIFEST).write_text("{")
    assert best_checkpoint(folder, "reward") == folder / "step-000006"


def test_a_checkpoint_on_its_way_out_is_never_seen_in_part(
    trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, state, folder = trained
    state.step = 3

    def crash(path: Path, **more: Any) -> None:
        (Path(path) / MANIFEST).unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(folder, take_snapshot(generator, state))
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-000003"]
    monkeypatch.undo()
    state.step = 4
    save_checkpoint(folder, take_snapshot(generator, state))
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []


def test_a_checkpoint_of_another_run_is_refused(trained: tuple) -> None:
    _, _, folder = trained
    snapshot = read_checkpoint(folder / "step-000002")
    nft = start(settings_for(NftSettings(), updates=2))
    with pytest.raises(ValueError, match="of the same algorithm, got one without an old policy"):
        restore(*nft, snapshot)
    averaged = start(settings_for(GrpoSettings(), updates=2, average_decay=0.5))
    with pytest.raises(ValueError, match="use of optimizer.average_decay, got one without"):
        restore(*averaged, snapshot)
    other = ToyGenerator()
    attach_lora(other.transformer, LoraSettings(rank=3, targets=("shift",)))
    state = begin(other, settings_for(GrpoSettings(), updates=2))
    with pytest.raises(ValueError, match="checkpoint/.* must fit the generator's transformer"):
        restore(other, state, snapshot)
    grpo = start(settings_for(GrpoSettings(), updates=2))
    with pytest.raises(ValueError, match="of the same algorithm, got one with an old policy"):
        restore(*grpo, take_snapshot(*nft))
