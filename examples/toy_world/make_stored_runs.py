"""Train and store the runs that the demo's report shows beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusion_rl.commands.train import train_with_bar
from diffusion_rl.configuration import load_config
from diffusion_rl.launch import Run, prepare
from diffusion_rl.prompts import read_prompts
from diffusion_rl.tracking import METRICS_FILE
from examples.toy_world.demo_evaluation import (
    ORACLE,
    Evaluation,
    EvaluationSettings,
    evaluate_run,
    evaluation_prompts,
    fault_rates,
    side_summary,
)
from examples.toy_world.stored_run import (
    StoredPair,
    StoredRun,
    digest,
    load_stored_run,
    read_curves,
    save_stored_run,
)

STORED = {
    "unguarded": "configs/rl/toy_unguarded.yaml",
    "grpo": "configs/rl/toy_grpo.yaml",
    "nft": "configs/rl/toy_nft.yaml",
}
"""Name of a stored run to the YAML that makes it."""
PAIRS = 4


def store_run(name: str, state: Path, folder: Path, machine: str) -> Path:
    """Train (or go on with) one run, evaluate it and store what the report shows of it.

    Args:
        name: One of STORED.
        state: Folder of the run itself; its checkpoints make it resumable.
        folder: Where `<name>.json` goes; one made with the same weights and YAML is left as it is.
        machine: Where this happens, in words.
    """
    settings = load_config(STORED[name])
    weights = [settings.generator.path, settings.rewards[0].options["path_or_hub_id"]]
    made_with = digest(*map(Path, [*weights, STORED[name]]))
    known = load_stored_run(name, folder)
    if known is not None and known.made_with == made_with:
        return folder / f"{name}.json"
    # A folder of its own for each of them: a run never goes on with other weights or settings.
    output = state / "stored" / f"{name}-{made_with}"
    settings = load_config(STORED[name], [f"output={output}"])
    options = EvaluationSettings()
    prompts = evaluation_prompts(options, read_prompts(settings.prompts))
    run = prepare(settings, keep_text_encoder=True)
    train_with_bar(run, description=name)
    evaluation = evaluate_run(run, prompts, options)
    return save_stored_run(summarise_run(name, run, evaluation, machine, made_with), folder)


def summarise_run(
    name: str, run: Run, evaluation: Evaluation, machine: str, made_with: str
) -> StoredRun:
    """What is kept of a run."""
    return StoredRun(
        name=name,
        algorithm=run.settings.algorithm.name,
        config=STORED[name],
        machine=machine,
        made_with=made_with,
        updates=run.state.step,
        training_seconds=round(run.state.seconds, 1),
        videos_generated=run.state.videos_generated,
        curves=read_curves(run.output / METRICS_FILE),
        base=_rounded(side_summary(evaluation.base)),
        tuned=_rounded(side_summary(evaluation.tuned)),
        base_faults=_rounded(fault_rates(evaluation.base)),
        tuned_faults=_rounded(fault_rates(evaluation.tuned)),
        fps=evaluation.fps,
        pairs=choose_pairs(evaluation),
    )


def choose_pairs(evaluation: Evaluation) -> list[StoredPair]:
    """The first video of each of the first prompts whose base video the oracle finds sound."""
    base = evaluation.base
    chosen: dict[str, int] = {}
    for place, (prompt, report) in enumerate(zip(base.prompts, base.reports[ORACLE], strict=True)):
        if not report.broken:
            chosen.setdefault(prompt, place)
    return [
        StoredPair(prompt, base.videos[place], evaluation.tuned.videos[place])
        for prompt, place in list(chosen.items())[:PAIRS]
    ]


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{number:.4g}") for name, number in numbers.items()}
