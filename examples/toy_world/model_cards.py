"""The MODEL_CARD.md of each toy checkpoint, written from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.toy_world.measure import SAMPLINGS, parameter_count, size_mb
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
    sampling = figures["guided"]
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
    columns = [generator_column(figures[name]["generator"]) for name in SAMPLINGS]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    head = ("figure", *(_sampling(figures[name]) for name in SAMPLINGS))
    count = sampling["generator"]["videos"]
    text = _HEAD.format(
        library="diffusers", task="text-to-video", title="Toy world generator", about=about
    )
    return (
        f"{text}{use}\n## Data\n\n{data}\n\n## Training\n\nOn {machine}.\n\n{cost}\n"
        f"## Measured\n\n{count} videos of held-out prompts for each column, judged by the oracle "
        "(`oracle.py`), which tracks pixels. The demo trains and measures without guidance.\n\n"
        f"{_table(head, rows)}\n{_oracle(figures)}"
        "\n## Limits\n\nIt knows nothing but this world, and words of its prompts alone. It was "
        f"trained on texts padded to {TEXT_LENGTH} tokens: leave out `max_sequence_length` and the "
        "pipeline pads to 512, which it has never seen.\n"
    )


def generator_column(made: Mapping[str, Any]) -> dict[str, str]:
    """Figures of one way of sampling, by name."""
    return {
        "videos with a fault": _percent(made["anomaly_rate_oracle"]),
        "prompt followed": _percent(made["prompt_match"]),
        "motion (way of an object per frame, in frames)": f"{made['motion']:.4f}",
        "diversity between seeds of a prompt": f"{made['diversity']:.4f}",
        **{f"with {kind}": _percent(rate) for kind, rate in made["faults"].items()},
    }


def judge_column(judge: Mapping[str, Any]) -> dict[str, str]:
    """Figures on videos of one way of sampling, by name."""
    column = {}
    for mode in ("full", "fast"):
        part = judge[mode]
        column |= {
            f"verdict ROC-AUC, mode {mode}": f"{part['verdict_auc']:.3f}",
            f"verdict accuracy, mode {mode}": _percent(part["verdict_accuracy"]),
            f"temporal IoU of windows where both see a fault, mode {mode}": (
                f"{part['window_iou']:.3f}"
            ),
            f"clips it could not judge, mode {mode}": _percent(part["unjudged"]),
        }
    return {**column, "prompt alignment ROC-AUC": f"{judge['alignment_auc']:.3f}"}


def judge_card(
    folder: Path, figures: Mapping[str, Any], seconds: Mapping[str, float], machine: str
) -> str:
    """The card of checkpoints/judge."""
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
    columns = [judge_column(figures[name]["judge"]) for name in SAMPLINGS]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    head = ("figure", *(_sampling(figures[name]) for name in SAMPLINGS))
    rendered = figures["rendered"]
    known = [
        ("verdict ROC-AUC", f"{rendered['verdict_auc']:.3f}"),
        ("verdict accuracy", _percent(rendered["verdict_accuracy"])),
    ]
    text = _HEAD.format(
        library="transformers", task="video-text-to-text", title="Toy world judge", about=about
    )
    return (
        f"{text}{use}\n## Data\n\n{data}\n\n## Training\n\n{_minutes(seconds['judge'])} on "
        f"{machine}, by the stages of `configs/reward/toy_stages.yaml`.\n\n## Measured\n\n"
        "Against the oracle (`oracle.py`, which tracks pixels and "
        f"shares no code with it) on {figures['guided']['generator']['videos']} videos for each "
        "column that the toy generator drew for held-out prompts:\n\n"
        f"{_table(head, rows)}\n"
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


def _sampling(figures: Mapping[str, Any]) -> str:
    scale, steps = figures["guidance_scale"], figures["num_inference_steps"]
    guided = "without guidance" if scale == 1 else f"guidance {scale:g}"
    return f"{guided}, {steps} steps"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    lines = [" | ".join(cells).join(("| ", " |")) for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"]) + "\n"
