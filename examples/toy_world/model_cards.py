"""The MODEL_CARD.md of each toy checkpoint, written from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.toy_world.measure import parameter_count, size_mb
from examples.toy_world.train_generator import TEXT_LENGTH

_HEAD = """---
license: apache-2.0
library_name: {library}
pipeline_tag: {task}
---

# {title}

{about}

Made from seeds alone by `make toy-checkpoints`; no outside data, no weights of others.

"""


def generator_card(
    folder: Path, figures: Mapping[str, Any], seconds: Mapping[str, float], machine: str
) -> str:
    """The card of checkpoints/generator."""
    made, faults = figures["generator"], figures["generator"]["faults"]
    sampling = figures["sampling"]
    about = (
        f"A text-to-video generator of {_millions(folder)} parameters ({size_mb(folder):.1f} MB): "
        "a stock diffusers `WanPipeline` (small `AutoencoderKLWan`, `WanTransformer3DModel`, UMT5 "
        "text encoder, word tokenizer, flow-matching Euler scheduler) that draws 13 frames of "
        "32 x 32 pixels at 8 frames per second: one to three coloured shapes that move. It breaks "
        "often, on purpose: it is what the demo's reinforcement learning mends."
    )
    use = _code(
        "from diffusers import WanPipeline",
        "",
        'pipeline = WanPipeline.from_pretrained("examples/toy_world/checkpoints/generator")',
        "frames = pipeline(",
        '    "a red circle moving sideways",',
        '    "",',
        "    height=32,",
        "    width=32,",
        "    num_frames=13,",
        f"    num_inference_steps={sampling['num_inference_steps']},",
        f"    guidance_scale={sampling['guidance_scale']},",
        f"    max_sequence_length={TEXT_LENGTH},",
        ").frames",
    )
    data = (
        "Clips of `examples/toy_world/world.py`, about half of them with planted faults (vanish, "
        "teleport, recolour, deform, duplicate, freeze, flicker) that their prompts never mention. "
        "One prompt in eight is held out for evaluation, by its hash."
    )
    cost = _table(
        ("part", "training time"),
        [
            ("autoencoder", _minutes(seconds["autoencoder"])),
            ("text encoder and transformer", _minutes(seconds["generator"])),
        ],
    )
    rows = [
        ("videos with a fault", _percent(made["anomaly_rate_oracle"])),
        ("prompt followed", _percent(made["prompt_match"])),
        ("motion (way of an object per frame, in frames)", f"{made['motion']:.4f}"),
        ("diversity between seeds of a prompt", f"{made['diversity']:.4f}"),
        *((f"with {kind}", _percent(rate)) for kind, rate in faults.items()),
    ]
    text = _HEAD.format(
        library="diffusers", task="text-to-video", title="Toy world generator", about=about
    )
    return (
        f"{text}{use}\n## Data\n\n{data}\n\n## Training\n\nOn {machine}.\n\n{cost}\n"
        f"## Measured\n\n{made['videos']} videos of held-out prompts with the demo's sampling "
        f"settings, judged by the oracle (`oracle.py`), which tracks pixels.\n\n"
        f"{_table(('figure', 'value'), rows)}\n{_oracle(figures)}"
        "\n## Limits\n\nIt knows nothing but this world, and words of its prompts alone. It was "
        f"trained on texts padded to {TEXT_LENGTH} tokens: leave out `max_sequence_length` and the "
        "pipeline pads to 512, which it has never seen.\n"
    )


def judge_card(
    folder: Path, figures: Mapping[str, Any], seconds: Mapping[str, float], machine: str
) -> str:
    """The card of checkpoints/judge."""
    judge = figures["judge"]
    about = (
        f"A vision-language judge of {_millions(folder)} parameters ({size_mb(folder):.1f} MB): a "
        "stock transformers Qwen3-VL with processor and tokenizer, trained from random weights to "
        "speak the two-turn protocol of `cac_reward`: scan a clip, ask to see suspicious windows "
        "again, name faults with windows and boxes, give a verdict. It also answers whether a clip "
        "shows its prompt."
    )
    use = _code(
        "from cac_reward import CaCScorer",
        "",
        'scorer = CaCScorer.from_pretrained("examples/toy_world/checkpoints/judge")',
        "report = scorer.inspect(videos, prompts, fps=8.0)[0]",
    )
    data = (
        "Rendered clips with the renderer's truth; the same clips after the generator's "
        "autoencoder and after compression; and the same clips partly noised and denoised by the "
        "generator, kept only where every object stayed where the truth has it. The oracle's word "
        "never reached the training; prompts and seeds of the evaluation are held out."
    )
    rows = []
    for mode in ("full", "fast"):
        part = judge[mode]
        rows += [
            (f"verdict ROC-AUC, mode {mode}", f"{part['verdict_auc']:.3f}"),
            (f"verdict accuracy, mode {mode}", _percent(part["verdict_accuracy"])),
            (
                f"temporal IoU of windows where both see a fault, mode {mode}",
                f"{part['window_iou']:.3f}",
            ),
            (f"clips it could not judge, mode {mode}", _percent(part["unjudged"])),
        ]
    rows.append(("prompt alignment ROC-AUC", f"{judge['alignment_auc']:.3f}"))
    rendered = judge["rendered"]
    known = [
        ("verdict ROC-AUC", f"{rendered['verdict_auc']:.3f}"),
        ("verdict accuracy", _percent(rendered["verdict_accuracy"])),
    ]
    text = _HEAD.format(
        library="transformers", task="video-text-to-text", title="Toy world judge", about=about
    )
    return (
        f"{text}{use}\n## Data\n\n{data}\n\n## Training\n\n{_minutes(seconds['judge'])} on "
        f"{machine}.\n\n## Measured\n\nAgainst the oracle (`oracle.py`, which tracks pixels and "
        f"shares no code with it) on {figures['generator']['videos']} videos that the toy "
        f"generator drew for held-out prompts:\n\n{_table(('figure', 'value'), rows)}\n"
        f"Against the truth on {rendered['clips']} rendered clips of held-out prompts after the "
        f"autoencoder, mode full:\n\n{_table(('figure', 'value'), known)}\n{_oracle(figures)}"
        "\n## Limits\n\nIts verdict means something on clips of the toy world alone.\n"
    )


def _oracle(figures: Mapping[str, Any]) -> str:
    errors = figures["oracle"]
    return (
        f"The oracle itself, on {errors['clips']} rendered clips after the autoencoder: right "
        f"about {_percent(errors['accuracy'])}, false alarms {_percent(errors['false_alarm_rate'])}"
        f", misses {_percent(errors['miss_rate'])}.\n"
    )


def _millions(folder: Path) -> str:
    return f"{parameter_count(folder) / 1e6:.2f}M"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes"


def _percent(value: float) -> str:
    return "not measurable" if math.isnan(value) else f"{100 * value:.1f}%"


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"]) + "\n"
