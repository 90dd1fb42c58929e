"""make toy-checkpoints: everything under checkpoints/, prompts/ and stored_runs/, from seeds alone.

    python -m examples.toy_world.make_checkpoints [--only STAGE] [--device cuda]

Stages run in order; one that is done is passed over, one that was interrupted goes on. Oracle
labels are used for measuring alone and reach no training.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_rl.commands.base import INTERRUPTED, USER_ERRORS
from examples.toy_world.world import sample_prompts

HERE = Path(__file__).parent
PROMPTS = {"train": (256, 0), "evaluation": (32, 1)}
"""File of prompts/ and split of the world to (how many, seed)."""
FIGURES = "figures.json"
CONFIG = "configs/rl/toy_nft.yaml"
JUDGE_RECIPE = "configs/reward/toy_stages.yaml"
NOTES = "\n## How these files came about\n"
"""Heading of what a person adds at the end of a card."""


@dataclass(frozen=True)
class Places:
    """Where everything goes."""

    state: Path
    """Folder of what training needs to go on; not part of the repository."""
    output: Path
    """Folder of the checkpoints."""
    prompts: Path
    """Folder of the prompt files."""
    stored_runs: Path
    """Folder of the stored runs."""
    device: str = "cpu"
    """Where the generator and its autoencoder are trained; the judge is trained on the CPU."""

    @property
    def generator(self) -> Path:
        return self.output / "generator"

    @property
    def judge(self) -> Path:
        return self.output / "judge"


@dataclass(frozen=True)
class Stage:
    """One step of the way."""

    name: str
    """For --only."""
    about: str
    """What it does, for the progress line."""
    run: Callable[[Places], None]
    """Does what is left of it; calling it again when all is done changes nothing."""


def make_autoencoder(places: Places) -> None:
    """Train the video autoencoder, then its decoder alone on whole clips."""
    from examples.toy_world.train_autoencoder import (
        polish_decoder,
        save_autoencoder,
        train_autoencoder,
    )

    state = places.state / "autoencoder.pt"
    train_autoencoder(state, places.device)
    polish_decoder(state, places.device)
    save_autoencoder(state, places.state / "autoencoder")


def make_latents(places: Places) -> None:
    """Encode the generator's training clips."""
    from examples.toy_world.train_generator import build_latent_bank

    build_latent_bank(places.state / "autoencoder", places.state / "latents.pt", places.device)


def make_generator(places: Places) -> None:
    """Train the generator and save it as a stock WanPipeline folder."""
    from examples.toy_world.train_generator import save_generator, train_generator

    state = places.state / "generator.pt"
    train_generator(places.state / "latents.pt", state, places.device)
    save_generator(places.state / "autoencoder", state, places.generator)


def make_judge(places: Places) -> None:
    """Write what the judge learns from, and train it by the stages of its recipe."""
    from cac_reward.training.curricula import JUDGE, load_curriculum
    from cac_reward.training.heads import HEADS_FILE
    from cac_reward.training.stages import run_stage
    from examples.toy_world.annotated_clips import main as write_clips
    from examples.toy_world.base_judge import build_base
    from examples.toy_world.judge_bank import build_judge_bank

    bank = places.state / "judge_bank.pt"
    if not bank.is_file():
        kept = build_judge_bank(places.generator, bank)
        _write_json(places.state / "judge_bank.json", kept)
    stages = load_curriculum(JUDGE_RECIPE)
    named = {file for stage in stages for file in stage.data.train + stage.data.held_out}
    for file in sorted(map(Path, named)):
        if not file.is_file():
            write_clips(["--output", str(file.parent), "--bank", str(bank), "--sets", file.stem])
    base = Path(stages[0].model.path)
    if not (base / "config.json").is_file():
        build_base(base)
    for number, stage in enumerate(stages, start=1):
        print(f"  stage {number} of {len(stages)}: {stage.output}")
        run_stage(stage)
    places.judge.mkdir(parents=True, exist_ok=True)
    for file in (Path(stages[-1].output) / JUDGE).iterdir():
        # The card is written anew, and the heads served the training alone.
        if file.name not in ("README.md", HEADS_FILE):
            shutil.copyfile(file, places.judge / file.name)


def make_prompts(places: Places) -> None:
    """Write the prompts of training and evaluation, which have none in common."""
    places.prompts.mkdir(parents=True, exist_ok=True)
    for split, (count, seed) in PROMPTS.items():
        lines = sample_prompts(count, seed, split)
        (places.prompts / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_figures(places: Places) -> None:
    """Measure both checkpoints."""
    from examples.toy_world.measure import bars, measure_checkpoints
    from examples.toy_world.stored_run import digest

    file, made_with = places.state / FIGURES, digest(places.generator, places.judge)
    if not file.is_file() or _read_json(file)["checkpoints"] != made_with:
        _write_json(file, {"checkpoints": made_with, **measure_checkpoints(CONFIG)})
    for name, value, rule, reached in bars(_read_json(file)):
        print(f"  {name}: {value:.3f} (wanted {rule}){'' if reached else '   NOT REACHED'}")


def make_stored_runs(places: Places) -> None:
    """Run what the demo shows beside its own training."""
    from examples.toy_world.demo import CONFIGS, UNGUARDED
    from examples.toy_world.make_stored_runs import store_run

    for name in (UNGUARDED, *list(CONFIGS)[1:]):
        store_run(name, places.state, places.stored_runs, describe_machine())


def make_cards(places: Places) -> None:
    """Write a MODEL_CARD.md into each checkpoint folder; what stands there under NOTES stays."""
    from examples.toy_world.model_cards import generator_card, judge_card

    figures = _read_json(places.state / FIGURES)
    seconds = training_seconds(places.state)
    machine = describe_machine()
    cards = {
        places.generator: generator_card(places.generator, figures, seconds, machine),
        places.judge: judge_card(places.judge, figures, seconds, machine),
    }
    for folder, text in cards.items():
        file = folder / "MODEL_CARD.md"
        earlier = file.read_text(encoding="utf-8") if file.is_file() else ""
        notes = NOTES + earlier.partition(NOTES)[2] if NOTES in earlier else ""
        file.write_text(text + notes, encoding="utf-8")


STAGES = (
    Stage("autoencoder", "train the video autoencoder", make_autoencoder),
    Stage("latents", "encode the generator's training clips", make_latents),
    Stage("generator", "train the generator", make_generator),
    Stage("judge", "train the judge by the stages of its recipe", make_judge),
    Stage("prompts", "draw the prompts", make_prompts),
    Stage("figures", "measure generator, judge and oracle", make_figures),
    Stage("stored-runs", "train without guards, and with the other algorithm", make_stored_runs),
    Stage("cards", "write the model cards", make_cards),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit status."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    places = Places(
        options.state, options.output, options.prompts, options.stored_runs, options.device
    )
    chosen = [stage for stage in STAGES if options.only in (None, stage.name)]
    try:
        for number, stage in enumerate(chosen, start=1):
            print(f"{number}/{len(chosen)} {stage.name}: {stage.about}")
            began = time.monotonic()
            stage.run(places)
            print(f"  done in {time.monotonic() - began:.0f} s")
    except KeyboardInterrupt:
        print("\nstopped; go on with: make toy-checkpoints")
        return INTERRUPTED
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.toy_world.make_checkpoints",
        description="Make the toy world's checkpoints from seeds; resumable.",
    )
    parser.add_argument("--only", choices=[stage.name for stage in STAGES], help="one stage")
    parser.add_argument("--state", type=Path, default=Path("runs/toy"), help="training states")
    parser.add_argument("--output", type=Path, default=HERE / "checkpoints")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts")
    parser.add_argument("--stored-runs", type=Path, default=HERE / "stored_runs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def training_seconds(state: Path) -> dict[str, float]:
    """Seconds of training, as the state files and the judge's stages counted them."""
    from cac_reward.training.curricula import load_curriculum
    from cac_reward.training.stages import RESULT_FILE
    from examples.toy_world.training_state import load_state

    seconds = {}
    for name in ("autoencoder", "generator"):
        saved = load_state(state / f"{name}.pt")
        if saved is None:
            raise FileNotFoundError(
                f"state must hold {name}.pt, got none in {state}; run the stage {name} first"
            )
        seconds[name] = saved["seconds"]
    seconds["judge"] = 0.0
    for stage in load_curriculum(JUDGE_RECIPE):
        file = Path(stage.output) / RESULT_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} must exist; run the stage judge first")
        seconds["judge"] += _read_json(file)["seconds"]
    return seconds


def describe_machine() -> str:
    """Cores and processor of this machine, such as '2 cores of Intel(R) Xeon(R)'."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist; run the stage {path.stem} first")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
