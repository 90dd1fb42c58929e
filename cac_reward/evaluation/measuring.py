"""All measures of a judge on annotated clips, with intervals and with how many clips each rests on.

What is missing is left out of a measure and counted, never filled in, but in measures 'of all'.
Axes: N clips.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cac_reward.evaluation import grounding
from cac_reward.evaluation.classification import (
    anchored_roc_auc,
    average_precision,
    calibration_error,
    pr_auc,
    rates,
    roc_auc,
)
from cac_reward.evaluation.intervals import Estimate, bootstrap
from cac_reward.evaluation.pairing import Pair, Pairing
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.protocols import Protocol
from cac_reward.evaluation.sums import Mean, mean_of, ratio, weighed
from cac_reward.evaluation.tasks import classes, generators, questions
from cac_reward.report import VERDICTS, Finding

LATER = "vau_eval."
"""Measures that a protocol may name though this evaluation has none of them."""
NOT_ANSWERED = Prediction()


@dataclass(frozen=True)
class Measurement:
    """One measure."""

    name: str
    """As in 'clip.accuracy'."""
    estimate: Estimate
    num_clips: int
    """That it rests on."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of one judge."""

    judges: tuple[str, ...]
    """Ids and modes that the reports name."""
    counts: Mapping[str, int]
    """Clips by what is known of them."""
    measurements: tuple[Measurement, ...]
    """Those of the protocol first."""
    settings: Mapping[str, float]
    """Of the bootstrap."""
    protocol: Protocol | None = None
    """The benchmark whose figures head the measures."""


def evaluate(
    pairing: Pairing,
    *,
    answers: Mapping[str, str] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    protocol: Protocol | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure the answers of a judge.

    Args:
        pairing: Annotated clips and what was answered.
        answers: To the clips' questions, by the clips' names; else the predictions' own.
        scores: More measures by name, each a number for some clips, by the clips' names.
        protocol: The benchmark; the clips must be of its split and pass `Protocol.check`.
        draws: Of the bootstrap, over recordings (`AnnotatedClip.origin`); 0 for no intervals.
        level: Of the intervals, in (0, 1).
        seed: Of the draws.

    Raises:
        ValueError: If there is no pair, a setting is out of range, or the protocol names a measure
            that there is not.
    """
    if not pairing.pairs:
        raise ValueError("pairing must hold at least one pair, got none")
    pairs = [*pairing.pairs, *(Pair(clip, NOT_ANSWERED) for clip in pairing.unanswered)]
    means = _means(pairs, answers or {})
    for name, numbers in (scores or {}).items():
        means[name] = mean_of([numbers.get(pair.clip.name, math.nan) for pair in pairs])
    paired: dict[str, dict[str, Mean]] = {}
    if protocol is not None and "pairs" in protocol.needs:
        paired = generators(pairs)
        for name, each in paired.items():
            means |= {f"generator.{kind}.{name}": one for kind, one in each.items()}
    ranked = _ranked(pairs)

    def measure(weights: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, each in paired.items():
            known = [one for mean in each.values() if not math.isnan(one := weighed(mean, weights))]
            found[f"generators.{name}"] = sum(known) / len(known) if known else math.nan
        for level_name, samples in ranked.items():
            found |= _ranking(level_name, samples, weights)
        return found | {name: weighed(mean, weights) for name, mean in means.items()}

    groups = [pair.clip.origin for pair in pairs]
    estimates = bootstrap(measure, groups, draws=draws, level=level, seed=seed)
    bases = {name: int((below > 0).sum()) for name, (_, below) in means.items()}
    bases |= {name: len(member.unique()) for name, (_, _, member, _) in ranked.items()}
    bases["generators"] = sum(
        int((below > 0).sum()) for _, below in paired.get("accuracy", {}).values()
    )
    rows = [
        Measurement(name, one, bases[name if name in bases else name.split(".")[0]])
        for name, one in estimates.items()
    ]
    judges = tuple(sorted({pair.prediction.judge for pair in pairs if pair.prediction.judge}))
    settings = {"draws": draws, "level": level, "seed": seed, "recordings": len(set(groups))}
    ordered = tuple(_headed(rows, protocol))
    return Evaluation(judges, _counts(pairing, pairs), ordered, settings, protocol)


def _headed(rows: Sequence[Measurement], protocol: Protocol | None) -> list[Measurement]:
    """The protocol's measures in its order, then the others in theirs."""
    if protocol is None:
        return list(rows)
    named = {one.name: one for one in rows}
    for name in protocol.head:
        if name not in named and not name.startswith(LATER):
            raise ValueError(f"head must name measures, got {name!r} in {protocol.benchmark}")
    head = [named[name] for name in protocol.head if name in named]
    return head + [one for one in rows if one not in head]


def _counts(pairing: Pairing, pairs: Sequence[Pair]) -> dict[str, int]:
    answers = [pair.prediction for pair in pairing.pairs]
    verdicts = Counter(pair.clip.verdict for pair in pairs)
    judged = [pair for pair in pairs if _judged(pair)]
    return {
        "annotated clips": len(pairs),
        "with a prediction": len(answers),
        "without a prediction": len(pairing.unanswered),
        "predictions without an annotation": len(pairing.unannotated),
        "anomalous": verdicts[VERDICTS[1]],
        "clean": verdicts[VERDICTS[0]],
        "verdict not annotated": verdicts[None],
        "anomalous, windows not annotated": sum(
            pair.clip.verdict == VERDICTS[1] and not pair.clip.findings for pair in pairs
        ),
        "not judged: file not readable": sum(one.judge is None for one in answers),
        "not judged: answer not usable": sum(
            one.judge is not None and one.failure is not None for one in answers
        ),
        "answered without a verdict": sum(
            one.p_clean is None and one.failure is None for one in answers
        ),
        "judged without findings asked (fast)": sum(not pair.prediction.located for pair in judged),
        "asked when, not for boxes": sum(one.located and not one.boxes_asked for one in answers),
        "asked when, not for types": sum(one.located and not one.types_asked for one in answers),
        "judged, length in frames not known": sum(pair.length is None for pair in judged),
        "judged, length not as annotated": sum(_length_differs(pair) for pair in judged),
        "findings left out: window not usable": sum(one.windows_unusable for one in answers),
    }


def _length_differs(pair: Pair) -> bool:
    """By more than a frame and 1%."""
    ours, theirs = pair.prediction.num_frames, pair.clip.num_frames
    return ours is not None and theirs is not None and abs(ours - theirs) > max(1, 0.01 * theirs)


def _judged(pair: Pair) -> bool:
    return pair.prediction.p_clean is not None


Samples = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scores, truths, the clip of each, and how many each stands for; [S] each."""


def _ranking(level: str, samples: Samples, weights: Tensor) -> dict[str, float]:
    """Rates and rankings of clips or frames."""
    scores, truth, member, size = samples
    weight = weights[member] * size
    values = rates(scores, truth, weight)
    values["roc_auc"] = roc_auc(scores, truth, weight)
    values["average_precision"] = average_precision(scores, truth, weight)
    if level == "clip":
        values["calibration_error"] = calibration_error(scores, truth, weight)
    else:
        values["pr_auc"] = pr_auc(scores, truth, weight)
    return {f"{level}.{name}": value for name, value in values.items()}


def _frames(pair: Pair) -> Counter[tuple[float, bool]]:
    """Score and truth of a judged clip's frames, counted; none where either is not known."""
    anomalous = pair.clip.verdict == VERDICTS[1]
    p_clean, length = pair.prediction.p_clean, pair.length
    unknown = pair.clip.verdict is None or (anomalous and not pair.clip.findings)
    if p_clean is None or length is None or unknown:
        return Counter()
    fps, num_frames = length
    labels = grounding.frame_labels(pair.clip.findings, fps=fps, num_frames=num_frames)
    scores = grounding.frame_scores(
        1 - p_clean, pair.prediction.findings, fps=fps, num_frames=num_frames
    )
    # A clip has few different frames: a million frames are a few thousand weighted samples.
    return Counter(zip(scores, labels, strict=True))


def _ranked(pairs: Sequence[Pair]) -> dict[str, Samples]:
    """For 'clip' and 'frame', what is ranked."""
    clips: list[tuple[float, bool, int, int]] = []
    frames: list[tuple[float, bool, int, int]] = []
    for row, pair in enumerate(pairs):
        p_clean = pair.prediction.p_clean
        if p_clean is not None and pair.clip.verdict is not None:
            clips.append((1 - p_clean, pair.clip.verdict == VERDICTS[1], row, 1))
        frames += [(score, label, row, size) for (score, label), size in _frames(pair).items()]
    return {
        name: (
            torch.tensor([one[0] for one in samples], dtype=torch.float64),
            torch.tensor([one[1] for one in samples], dtype=torch.bool),
            torch.tensor([one[2] for one in samples], dtype=torch.long),
            torch.tensor([one[3] for one in samples], dtype=torch.float64),
        )
        for name, samples in (("clip", clips), ("frame", frames))
    }


def _macro(pair: Pair) -> float:
    """ROC-AUC of one clip's frames by themselves, anchored."""
    frames = _frames(pair)
    if not frames:
        return math.nan
    scores, labels = zip(*frames, strict=True)
    sizes = torch.tensor(list(frames.values()), dtype=torch.float64)
    return anchored_roc_auc(torch.tensor(scores), torch.tensor(labels), sizes)


def _means(pairs: Sequence[Pair], answers: Mapping[str, str]) -> dict[str, Mean]:
    """Measures that are averages over clips, findings or boxes."""
    predictions = [pair.prediction for pair in pairs]
    means = {"clip.judged": mean_of([float(_judged(pair)) for pair in pairs])}
    means["frame.macro_roc_auc"] = mean_of([_macro(pair) for pair in pairs])
    means |= _when_and_where(pairs)
    means["space.invalid_box_rate"] = ratio(
        [(one.boxes_invalid, one.boxes_written) for one in predictions]
    )
    for kind in sorted({one.type for pair in pairs for one in pair.clip.findings}):
        means |= _of_type(kind, pairs)
    means |= questions(pairs, answers)
    means |= classes(pairs)
    seconds = [math.nan if one.seconds is None else one.seconds for one in predictions]
    means["cost.seconds_per_clip"] = mean_of(seconds)
    for name, kind in (("tokens", ""), ("tokens_read", ".read"), ("tokens_written", ".written")):
        means[f"cost.{name}_per_clip"] = mean_of([_tokens(one, kind) for one in predictions])
    return means


def _tokens(prediction: Prediction, kind: str) -> float:
    """Of all stages together; NaN where they were not counted."""
    if prediction.tokens is None:
        return math.nan
    return float(sum(count for name, count in prediction.tokens.items() if name.endswith(kind)))


def _when_and_where(pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Over anomalous clips whose windows are annotated and whose judge was asked when, or where."""

    def over(measure: Callable[[Sequence[Finding], Sequence[Finding]], float]) -> list[float]:
        return [
            measure(pair.prediction.findings, pair.clip.findings) if asked else math.nan
            for pair, asked in zip(pairs, wanted, strict=True)
        ]

    wanted = [pair.prediction.located and bool(pair.clip.findings) for pair in pairs]
    iou = over(grounding.temporal_iou)
    means = {"time.mean_iou": mean_of(iou)}
    for least in grounding.RECALL_THRESHOLDS:
        reached = [math.nan if math.isnan(one) else float(one >= least) for one in iou]
        means[f"time.recall_at_{least}"] = mean_of(reached)
    means["time.effective_f1"] = mean_of(over(grounding.effective_temporal_f1))
    means["time.count_accuracy"] = mean_of(over(grounding.count_is_right))
    wanted = [
        asked and pair.prediction.boxes_asked for asked, pair in zip(wanted, pairs, strict=True)
    ]
    means["space.box_mean_iou"] = mean_of(over(grounding.mean_box_iou))
    tubes = [math.nan] * len(pairs)
    for row, pair in enumerate(pairs):
        if wanted[row] and pair.length is not None:
            fps, num_frames = pair.length
            tubes[row] = grounding.dense_tube_iou(
                pair.prediction.findings, pair.clip.findings, fps=fps, num_frames=num_frames
            )
    means["space.tube_mean_iou"] = mean_of(tubes)
    return means


def _of_type(kind: str, pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Of the faults of one kind: in clips judged anomalous; found; found under their name."""
    rows: dict[str, list[tuple[float, float]]] = {"recall": [], "found": [], "named": []}
    for pair in pairs:
        faults = [one for one in pair.clip.findings if one.type == kind]
        every = float(len(faults))
        caught = every if pair.prediction.verdict == VERDICTS[1] else 0.0
        rows["recall"].append((caught, every if _judged(pair) else 0.0))
        said = pair.prediction.findings if pair.prediction.located else ()
        alike = [one for one in said if one.type == kind]
        base = every if pair.prediction.located else 0.0
        rows["found"].append((float(sum(grounding.is_found(one, said) for one in faults)), base))
        named = float(sum(grounding.is_found(one, alike) for one in faults))
        rows["named"].append((named, base) if pair.prediction.types_asked else (0.0, 0.0))
    return {f"type.{kind}.{name}": ratio(parts) for name, parts in rows.items()}
