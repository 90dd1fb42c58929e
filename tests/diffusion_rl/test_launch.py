"""From a YAML to a run that can be stopped anywhere and gone on with."""

import dataclasses
import errno
import os
import signal
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import diffusion_rl.launch
from diffusion_rl import processes
from diffusion_rl.checkpoint import best_checkpoint, checkpoints, latest_checkpoint
from diffusion_rl.configuration import RunSettings, build, load_config
from diffusion_rl.credit import CreditSettings
from diffusion_rl.finetune import StepReport
from diffusion_rl.full_policies import FullSettings
from diffusion_rl.generators.settings import (
    ContextParallelSettings,
    ExecutionSettings,
    OffloadSettings,
)
from diffusion_rl.held_out import EvaluationSettings
from diffusion_rl.launch import (
    CHECKPOINTS,
    CONFIG_FILE,
    LORA,
    build_generator,
    prepare,
    train,
)
from diffusion_rl.lora import AVERAGE, TRAINED, lora_state
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.preflight import check_processes, check_run
from diffusion_rl.reward_contract import RewardSettings
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_settings import SETTINGS, GrpoSettings, NftSettings
from diffusion_rl.run_folder import PROMPTS_FILE, check_same_run, differences, set_aside
from diffusion_rl.run_lock import LOCK_FILE, release_lock
from diffusion_rl.samples import SampleSettings
from diffusion_rl.tracking import MetricsFile, read_metrics
from tests.full_run import full_run
from tests.several import run_on
from tests.tiny_wan import save_tiny_wan

CALLS = {"count": 0, "fail_at": 0}


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """A reward that breaks at the call it is told to."""
    CALLS["count"] += 1
    if CALLS["count"] == CALLS["fail_at"]:
        raise OSError("the judge is gone")
    return videos[:, :, 0].mean((1, 2, 3))


@pytest.fixture(autouse=True)
def fresh_reward() -> None:
    CALLS.update(count=0, fail_at=0)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture
def settings(wan: Path, tmp_path: Path) -> RunSettings:
    (tmp_path / "prompts.txt").write_text("a red circle\nthe blue square\n")
    return build(
        {
            "generator": {
                "path": str(wan),
                "height": 16,
                "width": 16,
                "num_frames": 5,
                "fps": 8.0,
                "max_sequence_length": 12,
            },
            "lora": {"rank": 2, "alpha": 4},
            "algorithm": {"name": "nft"},
            "rollout": {"num_inference_steps": 3, "prompts_per_update": 2, "videos_per_prompt": 2},
            "optimizer": {"learning_rate": 1e-2},
            "rewards": [{"name": "red", "target": f"{__name__}:redness"}],
            "guards": [{"statistic": "contrast"}],
            "prompts": str(tmp_path / "prompts.txt"),
            "updates": 4,
            "save_every": 2,
            "output": str(tmp_path / "run"),
        }
    )


def finish(settings: RunSettings) -> tuple[dict[str, Tensor], list[StepReport]]:
    run = prepare(settings)
    reports = list(train(run))
    return lora_state(run.generator.transformer), reports


def steps(settings: RunSettings) -> list[int]:
    return [line["step"] for line in read_metrics(Path(settings.output) / "metrics.jsonl")]


def test_a_finished_run_leaves_everything_a_reader_needs(settings: RunSettings) -> None:
    state, reports = finish(settings)
    output = Path(settings.output)
    assert [report.step for report in reports] == steps(settings) == [1, 2, 3, 4]
    assert load_config(output / CONFIG_FILE) == settings
    assert [path.name for path in checkpoints(output / CHECKPOINTS)] == [
        "step-000002",
        "step-000004",
    ]
    tuned = build_generator(settings.generator, lora=output / LORA)
    saved = lora_state(tuned.transformer)
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_run_closed_early_is_saved_where_it_stood_and_goes_on_bit_for_bit(
    settings: RunSettings, tmp_path: Path
) -> None:
    other = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    expected, _ = finish(other)
    with closing(train(prepare(settings))) as reports:
        for report in reports:
            if report.step == 3:
                break
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000003"
    resumed = prepare(settings)
    assert resumed.resumed
    assert [report.step for report in train(resumed)] == [4]
    assert steps(settings) == [1, 2, 3, 4]
    state = lora_state(resumed.generator.transformer)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_caller_raises_saves_too(settings: RunSettings, error: type) -> None:
    def interrupted() -> None:
        with closing(train(prepare(settings))) as reports:
            next(reports)
            raise error

    with pytest.raises(error):
        interrupted()
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000001"


def test_a_reward_that_breaks_loses_no_update(settings: RunSettings) -> None:
    CALLS["fail_at"] = 4
    with pytest.raises(RuntimeError, match="reward 'red' raised OSError: the judge is gone"):
        finish(settings)
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000003"
    CALLS["fail_at"] = 0
    _, reports = finish(settings)
    assert [report.step for report in reports] == [4]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = train(prepare(settings))
    next(reports)
    next(reports)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="step 4 .* the last complete one is .*step-000002"):
        list(reports)
    monkeypatch.undo()
    _, rest = finish(settings)
    assert [report.step for report in rest] == [3, 4]


def test_a_finished_run_may_be_made_longer(settings: RunSettings) -> None:
    finish(settings)
    assert finish(settings)[1] == []
    longer = dataclasses.replace(settings, updates=5)
    assert [report.step for report in finish(longer)[1]] == [5]


def test_a_finished_full_run_keeps_its_last_updates(tmp_path: Path) -> None:
    settings = dataclasses.replace(full_run(tmp_path), updates=3, save_every=2)
    list(train(prepare(settings)))
    folder = Path(settings.output) / CHECKPOINTS
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-000003"]
    longer = dataclasses.replace(settings, updates=4)
    assert [report.step for report in train(prepare(longer))] == [4]


def test_a_run_that_was_moved_goes_on(settings: RunSettings, tmp_path: Path) -> None:
    finish(settings)
    folder = Path(settings.output).rename(tmp_path / "elsewhere")
    prompts = Path(settings.prompts).rename(tmp_path / "moved.txt")
    moved = dataclasses.replace(settings, output=str(folder), prompts=str(prompts), updates=5)
    said = (folder / PROMPTS_FILE).rename(folder / "away")
    with pytest.raises(ValueError, match=r"made with prompts=.*, now .*moved\.txt; choose"):
        prepare(moved)  # Nobody knows whether they are the same.
    release_lock(folder)
    said.rename(folder / PROMPTS_FILE)
    assert [report.step for report in finish(moved)[1]] == [5]
    assert load_config(folder / CONFIG_FILE).output == str(folder)


def test_other_settings_do_not_go_on_with_this_run(settings: RunSettings) -> None:
    finish(settings)
    other = dataclasses.replace(settings, seed=1)
    message = "same settings, got .* made with seed=0, now 1; choose another output, or --restart"
    with pytest.raises(ValueError, match=message):
        prepare(other)
    worse = dataclasses.replace(other, lora=dataclasses.replace(settings.lora, rank=3))
    with pytest.raises(ValueError, match="made with lora.rank=2, now 3; seed=0, now 1; choose"):
        prepare(worse)
    config = Path(settings.output) / CONFIG_FILE
    config.rename(config.with_suffix(".away"))
    with pytest.raises(
        ValueError, match="must hold a config.yaml beside its checkpoints, got none"
    ):
        prepare(settings)
    for rest, problem in (("", "generator must be given"), ("seed: [", "config must be readable")):
        config.write_text(rest)
        message = rf"must hold a whole config.yaml .*, got {config}, of which {problem}.*--restart"
        with pytest.raises(ValueError, match=f"(?s){message}"):
            prepare(settings)
    config.with_suffix(".away").rename(config)
    gentler = dataclasses.replace(settings.optimizer, learning_rate=1e-4)
    check_same_run(
        dataclasses.replace(
            settings, optimizer=gentler, updates=9, save_every=1, keep=5, best_by="reward"
        )
    )


def test_the_newest_and_the_best_checkpoints_stay(settings: RunSettings) -> None:
    kept = dataclasses.replace(settings, save_every=1, keep=1, best_by="rewards/red", updates=6)
    _, reports = finish(kept)
    rewards = [report.rewards["red"] for report in reports]
    best = max(range(6), key=rewards.__getitem__) + 1
    folder = Path(settings.output) / CHECKPOINTS
    assert {path.name for path in checkpoints(folder)} == {f"step-{best:06d}", "step-000006"}
    assert best_checkpoint(folder, "rewards/red") == folder / f"step-{best:06d}"


def test_a_second_writer_is_refused_until_the_first_has_ended(settings: RunSettings) -> None:
    reports = train(prepare(settings))
    next(reports)

    def second() -> None:
        for restart in (False, True):
            with pytest.raises(ValueError, match=rf"process {os.getppid()} on .* is training"):
                prepare(settings, restart=restart)

    assert run_on(1, second) == [None]
    reports.close()
    assert run_on(1, lambda: prepare(settings).state.step) == [1]


def test_a_run_that_could_not_be_prepared_gives_its_folder_free(settings: RunSettings) -> None:
    missing = dataclasses.replace(settings, prompts=settings.prompts + ".gone")
    with pytest.raises(FileNotFoundError):
        prepare(missing)
    assert run_on(1, lambda: prepare(settings).state.step) == [0]


def test_a_run_does_not_go_on_with_other_prompts(settings: RunSettings) -> None:
    finish(settings)
    file = Path(settings.prompts)
    file.write_text("a red circle\nthe blue square \n")
    longer = dataclasses.replace(settings, updates=5)
    assert prepare(longer).state.step == 4
    release_lock(Path(settings.output))
    file.write_text("a red circle\na green star\nthe blue square\n")
    message = (
        "prompts must be those that the run began with, got 3 where it had 2, the first that "
        "differs number 2: 'a green star', was 'the blue square'; put them back .*prompts.json"
    )
    with pytest.raises(ValueError, match=message):
        prepare(longer)
    file.write_text("a red circle\n")
    with pytest.raises(ValueError, match="number 2: None, was 'the blue square'"):
        prepare(longer)


def test_a_tracker_that_is_not_there_is_said_before_anything_is_loaded(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr("diffusion_rl.launch.load_run", lambda *own: loaded.append(own))
    with pytest.raises(ImportError, match="trackers must be installed, got 'nowhere'; install it"):
        prepare(dataclasses.replace(settings, trackers=("nowhere",)))
    assert loaded == []
    assert not Path(settings.output).exists()


def test_a_tracker_that_fails_leaves_the_folder_free(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(own: RunSettings) -> list:
        raise OSError("no such project")

    monkeypatch.setattr("diffusion_rl.launch.build_trackers", fail)
    with pytest.raises(OSError, match="no such project"):
        list(train(prepare(settings)))
    assert not (Path(settings.output) / LOCK_FILE).exists()


def test_a_run_without_guards_is_warned_of(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    check_run(settings)
    assert caplog.text == ""
    check_run(dataclasses.replace(settings, guards=()))
    assert "guards is empty: nothing keeps the policy from still" in caplog.text


def test_float16_is_for_drawing_alone(settings: RunSettings) -> None:
    """The gradient of a mean over a million numbers is below what float16 can hold."""
    half = dataclasses.replace(settings.generator, dtype="float16")
    with pytest.raises(ValueError, match="generator.dtype must be bfloat16 or float32 to train, g"):
        check_run(dataclasses.replace(settings, generator=half))


def test_unbalanced_focus_is_warned_of_where_losses_are_not_exact(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = dataclasses.replace(settings.rollout, stochastic_steps=1)
    settings = dataclasses.replace(settings, rollout=rollout)
    for row, credit, warned in (
        (NftSettings(), CreditSettings(name="grounded"), True),
        (NftSettings(), CreditSettings(name="grounded", balanced=True), False),
        (NftSettings(), CreditSettings(name="grounded", mix=0.0), False),
        (NftSettings(), CreditSettings(), False),
        (GrpoSettings(), CreditSettings(name="grounded"), False),
    ):
        caplog.clear()
        check_run(dataclasses.replace(settings, algorithm=row, credit=credit))
        assert ("credit.balanced is off: with nft" in caplog.text) == warned


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_beside_the_metrics_leaves_no_gap_in_them(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    write = MetricsFile.write

    def interrupted(self: MetricsFile, report: StepReport) -> None:
        if written or report.step != 3:
            write(self, report)
        if report.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(train(prepare(settings)))
    list(train(prepare(settings)))
    assert steps(settings) == [1, 2, 3, 4]


def test_a_killed_run_goes_on_bit_for_bit(settings: RunSettings, tmp_path: Path) -> None:
    """Killed with -9 in the middle of an update, its folder still marked as its own."""
    own = dataclasses.replace(
        settings,
        optimizer=dataclasses.replace(settings.optimizer, average_decay=0.9),
        updates=5,
    )
    run = prepare(dataclasses.replace(own, output=str(tmp_path / "whole")))
    list(train(run))
    expected = run.generator.transformer

    def killed() -> None:
        run = prepare(own)
        run.rewards[0] = dataclasses.replace(
            run.rewards[0], function=lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        )
        for _ in train(run):
            raise AssertionError("it was not killed")

    def begun() -> None:
        for report in train(prepare(own)):
            if report.step == 3:
                return

    assert run_on(1, begun) == [None]
    assert run_on(1, killed) == [-signal.SIGKILL]
    assert (Path(own.output) / LOCK_FILE).is_file()
    resumed = prepare(own)
    assert [report.step for report in train(resumed)] == [4, 5]
    assert steps(own) == [1, 2, 3, 4, 5]
    for adapter in (TRAINED, AVERAGE):
        before, after = (
            lora_state(one, adapter) for one in (expected, resumed.generator.transformer)
        )
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (Path(own.output) / LOCK_FILE).exists()


def test_several_processes_go_on_with_a_run_of_another_number(
    settings: RunSettings, tmp_path: Path
) -> None:
    """On 2 processes, 4, and 1: as if one process had done it all."""
    # One video in a pass: a pass of more differs in its last bits, and Adam makes much of that
    # where a tiny model has next to no gradient.
    longer = dataclasses.replace(
        settings,
        updates=6,
        save_every=1,
        rollout=dataclasses.replace(settings.rollout, micro_batch=1),
        optimizer=dataclasses.replace(settings.optimizer, learning_rate=3e-4),
    )
    expected, reports = finish(dataclasses.replace(longer, output=str(tmp_path / "whole")))

    def go_on(until: int) -> tuple[dict[str, Tensor], list[int]]:
        run = prepare(dataclasses.replace(longer, updates=until))
        done = [report.step for report in train(run)]
        return lora_state(run.generator.transformer), done

    for count, until in ((2, 2), (4, 4), (1, 5), (2, 6)):
        group = run_on(count, partial(go_on, until))
        for one in group:
            assert isinstance(one, tuple), one
            assert one[1] == list(range(until - len(one[1]) + 1, until + 1)) != []
            assert all(torch.equal(one[0][name], group[0][0][name]) for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(group[0][0][name], value, rtol=0, atol=1e-6)
    assert steps(longer) == [1, 2, 3, 4, 5, 6]
    lines = read_metrics(Path(longer.output) / "metrics.jsonl")
    for line, report in zip(lines, reports, strict=True):
        assert line["reward"] == pytest.approx(report.reward, abs=1e-6)
        assert line["videos_generated"] == report.videos_generated
    output = Path(longer.output)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lora",
        "metrics.jsonl",
        "prompts.json",
    ]


def test_a_reward_that_breaks_on_one_process_keeps_the_last_checkpoint(
    settings: RunSettings,
) -> None:
    def broken() -> None:
        run = prepare(settings)
        for report in train(run):
            if processes.rank() == 1 and report.step == 3:
                CALLS["fail_at"] = CALLS["count"] + 1

    first, second = run_on(2, broken)
    assert "process 1 of 2 failed while judging videos" in str(first)
    assert "reward 'red' raised OSError: the judge is gone" in str(second)
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000003"
    assert [report.step for report in finish(settings)[1]] == [4]


def test_a_folder_that_only_one_process_can_claim_stops_all(settings: RunSettings) -> None:
    finish(settings)
    other = dataclasses.replace(settings, seed=1)
    first, second = run_on(2, lambda: prepare(other))
    assert "made with seed=0, now 1" in str(first)
    assert "process 0 of 2 failed while taking the output folder: ValueError" in str(second)


def test_restarting_keeps_the_earlier_run(settings: RunSettings) -> None:
    finish(settings)
    output = Path(settings.output)
    for number in (1, 2):
        run = prepare(dataclasses.replace(settings, seed=number), restart=True)
        assert run.state.step == 0
        assert (output.with_name(f"run.previous-{number}") / CONFIG_FILE).is_file()
    assert (output.with_name("run.previous-1") / LORA).is_dir()
    assert set_aside(output).name == "run.previous-3"
    assert not output.exists()


def test_the_text_encoder_is_released_unless_it_is_needed(settings: RunSettings) -> None:
    run = prepare(settings)
    assert len(run.embeddings) == len(run.prompts) == 2
    with pytest.raises(RuntimeError, match="encode_prompts must be called before"):
        run.generator.encode_prompts(["again"])
    kept = prepare(settings, keep_text_encoder=True)
    assert len(kept.generator.encode_prompts(["again"])) == 1


def test_differences_name_their_place() -> None:
    before = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": [1]}
    now = {"a": {"b": 1, "c": [1, {"d": 3}]}, "e": [1, 2], "f": None, "g": 0}
    assert list(differences(before, now)) == [
        ("a.c[1].d", 2, 3),
        ("e", [1], [1, 2]),
        ("g", None, 0),
    ]
    assert list(differences(before, before)) == []


@pytest.mark.parametrize("row", ["grpo", "nft"])
def test_sharded_weights_learn_what_whole_ones_learn(
    settings: RunSettings, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 over gloo, as the launcher's variables ask for it; 5 videos, 3 for one process."""
    own = dataclasses.replace(
        settings,
        algorithm=SETTINGS[row](kl_weight=0.1),
        rollout=RolloutSettings(
            num_inference_steps=3,
            stochastic_steps=1,
            prompts_per_update=1,
            videos_per_prompt=5,
            micro_batch=1,
        ),
        optimizer=dataclasses.replace(settings.optimizer, learning_rate=3e-4),
        updates=2,
    )
    expected, reports = finish(dataclasses.replace(own, output=str(tmp_path / "whole")))

    def sharded() -> tuple[dict[str, Tensor], float, float]:
        run = prepare(own)
        weights = list(run.generator.transformer.parameters())
        here = sum(
            one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in weights
        )
        rewards = [report.reward for report in train(run)]
        share = here / sum(one.numel() for one in weights)
        return lora_state(run.generator.transformer), rewards[-1], share

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    first, second = run_on(2, sharded)
    for one in (first, second):
        assert isinstance(one, tuple), one
        for name, value in expected.items():
            # The old policy of whole float32 weights is merged into them, which rounds otherwise.
            torch.testing.assert_close(one[0][name], value, rtol=0, atol=1e-5)
        assert one[1] == pytest.approx(reports[-1].reward, abs=1e-6)
        assert one[2] < 0.6


RECORDED: dict[str, Any] = {
    "algorithm": GrpoSettings(),
    "rollout": RolloutSettings(num_inference_steps=3, stochastic_steps=1),
}
FULL: dict[str, Any] = {"full": FullSettings(), "lora": None}
ELSEWHERE = RewardSettings(name="red", target=f"{__name__}:redness", where="process")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": SampleSettings(every=1, prompts=("a cup",))},
            "samples must be left out where",
        ),
        (
            {**FULL, "optimizer": OptimizerSettings(name="muon")},
            "optimizer.name must be one of adamw with full where the launcher shards",
        ),
        (
            {**FULL, "staleness": 1, "rewards": (ELSEWHERE,), **RECORDED},
            "staleness must be 0 with full where the launcher shards",
        ),
        (
            {
                "execution": ExecutionSettings(
                    offload=OffloadSettings(), gradient_checkpointing=True
                ),
                "device": "cuda",
            },
            "execution.offload.parts must be without the transformer where the launcher shards",
        ),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused(
    settings: RunSettings,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    of_run = {key: value for key, value in changes.items() if hasattr(settings, key)}
    of_generator = {key: value for key, value in changes.items() if key not in of_run}
    generator = dataclasses.replace(settings.generator, **of_generator)
    own = dataclasses.replace(settings, generator=generator, **of_run)
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        check_processes(own)
    assert caplog.text == ""
    monkeypatch.setattr(processes, "count", lambda: 1)
    check_processes(own)  # What one process can do, it does, and says that weights are whole.
    assert "distributed_type: FSDP of the launcher does nothing with num_proc" in caplog.text


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "distributed_type: FSDP of the launcher does nothing"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
            "distributed_type: FSDP of the launcher, fsdp_offload_params among it, does nothing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type: DEEPSPEED of the launcher does"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, None),
    ],
)
def test_one_process_says_that_it_shares_out_nothing(
    settings: RunSettings,
    launcher: dict[str, str],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    check_processes(settings)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    for line in lines:
        assert line.startswith(str(said))
        assert "holds all weights and their state; start several, or save memory" in line
        assert "generator.execution.offload" in line


def test_accumulation_that_nothing_heeds_is_refused(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in ("auto", "1"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", asked)
        check_processes(settings)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    message = "gradient_accumulation_steps of the launcher must be auto or 1, got 4; .* rollout"
    with pytest.raises(ValueError, match=message):
        check_processes(settings)


def test_fewer_held_out_videos_than_processes_are_refused_before_anything_is_loaded(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = EvaluationSettings(rewards=settings.rewards, prompts=settings.prompts)
    own = dataclasses.replace(settings, evaluation=held_out)
    monkeypatch.setattr(processes, "count", lambda: 3)
    message = (
        "evaluation.prompts times evaluation.videos_per_prompt must be at least the 3 processes "
        ".*, got 2 x 1 videos; raise evaluation.videos_per_prompt, add prompts, or start fewer"
    )
    with pytest.raises(ValueError, match=message):
        check_run(own)
    enough = dataclasses.replace(held_out, videos_per_prompt=2)
    check_run(dataclasses.replace(own, evaluation=enough))
    teams = ContextParallelSettings(ulysses=3)
    execution = dataclasses.replace(settings.generator.execution, context_parallel=teams)
    generator = dataclasses.replace(settings.generator, execution=execution)
    check_run(dataclasses.replace(own, generator=generator))


def test_weights_that_learn_are_not_offloaded_by_the_launcher(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(processes, "count", lambda: 2)
    check_processes(settings)
    with pytest.raises(ValueError, match="fsdp_offload_params must be false with full, got true"):
        check_processes(dataclasses.replace(settings, **FULL))


def test_what_stays_of_the_checkpoints_is_checked(settings: RunSettings) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        dataclasses.replace(settings, keep=0)
    for name, near in (("rewards/rad", "rewards/red"), ("gard_norm", "grad_norm")):
        message = f"best_by must be a metric of the run, got {name}; did you mean {near}"
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(settings, best_by=name)
    for name in ("alarms", "guards", "rewards"):
        with pytest.raises(ValueError, match=f"best_by must be a metric of the run, got {name}"):
            dataclasses.replace(settings, best_by=name)
    dataclasses.replace(settings, best_by="guards/contrast")


def test_processes_that_see_other_disks_stop(settings: RunSettings) -> None:
    finish(settings)

    def elsewhere() -> None:
        if processes.rank() == 1:
            diffusion_rl.launch.latest_checkpoint = lambda folder: None
        prepare(settings)

    for said in run_on(2, elsewhere):
        assert "output must be on a disk that all processes see" in str(said)
        assert "updates [4, 0]" in str(said)
