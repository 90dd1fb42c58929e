"""All measures of a judge on annotated clips, with intervals and with how many clips each rests on.

What is missing is left out of a measure and counted, never filled in.
Axes: N clips.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.evaluation import grounding
from cac_reward.evaluation.classification import (
    average_precision,
    calibration_error,
    rates,
    roc_auc,
)
from cac_reward.evaluation.intervals import Estimate, bootstrap
from cac_reward.evaluation.pairing import Pair, Pairing
from cac_reward.report import VERDICTS, AnomalyReport, Finding

Mean = tuple[Tensor, Tensor]
"""Numerators and denominators of the clips, [N] each; a clip with denominator 0 does not count."""


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
    settings: Mapping[str, float]
    """Of the bootstrap."""


def evaluate(
    pairing: Pairing,
    *,
    answers: Mapping[str, str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure the answers of a judge.

    Args:
        pairing: Annotated clips and their records.
        answers: To the clips' questions, by the clips' names.
        draws: Of the bootstrap, over recordings (`AnnotatedClip.origin`); 0 for no intervals.
        level: Of the intervals, in (0, 1).
        seed: Of the draws.

    Raises:
        ValueError: If there is no pair, or a setting is out of range.
    """
    pairs = pairing.pairs
    means = _means(pairs, answers or {})
    ranked = _ranked(pairs)

    def measure(weights: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for level_name, (scores, truth, member, size) in ranked.items():
            weight = weights[member] * size
            values = rates(scores, truth, weight)
            values["roc_auc"] = roc_auc(scores, truth, weight)
            values["average_precision"] = average_precision(scores, truth, weight)
            if level_name == "clip":
                values["calibration_error"] = calibration_error(scores, truth, weight)
            found |= {f"{level_name}.{name}": value for name, value in values.items()}
        for name, (above, below) in means.items():
            whole = (weights * below).sum().item()
            found[name] = (weights * above).sum().item() / whole if whole else math.nan
        return found

    groups = [pair.clip.origin for pair in pairs]
    estimates = bootstrap(measure, groups, draws=draws, level=level, seed=seed)
    bases = {name: int((below > 0).sum()) for name, (_, below) in means.items()}
    bases |= {name: len(member.unique()) for name, (_, _, member, _) in ranked.items()}
    rows = tuple(
        Measurement(name, one, bases[name if name in bases else name.split(".")[0]])
        for name, one in estimates.items()
    )
    reports = [pair.record.report for pair in pairs if pair.record.report]
    judges = tuple(sorted({f"{report.judge_id} ({report.mode})" for report in reports}))
    settings = {"draws": draws, "level": level, "seed": seed, "recordings": len(set(groups))}
    return Evaluation(judges, _counts(pairing), rows, settings)


def _counts(pairing: Pairing) -> dict[str, int]:
    pairs = pairing.pairs
    reports = [pair.record.report for pair in pairs if pair.record.report is not None]
    verdicts = Counter(pair.clip.verdict for pair in pairs)
    return {
        "annotated clips": len(pairs) + len(pairing.unanswered),
        "with a prediction": len(pairs),
        "without a prediction": len(pairing.unanswered),
        "predictions without an annotation": len(pairing.unannotated),
        "anomalous": verdicts[VERDICTS[1]],
        "clean": verdicts[VERDICTS[0]],
        "verdict not annotated": verdicts[None],
        "anomalous, windows not annotated": sum(
            pair.clip.verdict == VERDICTS[1] and not pair.clip.findings for pair in pairs
        ),
        "not judged: file not readable": len(pairs) - len(reports),
        "not judged: answer not usable": sum(report.score is None for report in reports),
        "judged without findings asked (fast)": sum(_judged(p) and not _located(p) for p in pairs),
    }


def _judged(pair: Pair) -> bool:
    return pair.record.report is not None and pair.record.report.score is not None


def _located(pair: Pair) -> bool:
    """Whether the judge was asked where; a verdict alone says nothing of places, right or wrong."""
    return _judged(pair) and _report(pair).mode != "fast"


def _report(pair: Pair) -> AnomalyReport:
    assert pair.record.report is not None
    return pair.record.report


def _ranked(pairs: Sequence[Pair]) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For 'clip' and 'frame': scores, truths, the clip of each, and how many each stands for."""
    clips: list[tuple[float, bool, int, int]] = []
    frames: list[tuple[float, bool, int, int]] = []
    for row, pair in enumerate(pairs):
        if not _judged(pair) or pair.clip.verdict is None:
            continue
        report, anomalous = _report(pair), pair.clip.verdict == VERDICTS[1]
        clips.append((1 - report.reward, anomalous, row, 1))
        if anomalous and not pair.clip.findings:
            continue
        labels = grounding.frame_labels(
            pair.clip.findings, fps=report.fps, num_frames=report.num_frames
        )
        # A clip has few different frames: a million frames are a few thousand weighted samples.
        same = Counter(zip(grounding.frame_scores(report), labels, strict=True))
        frames += [(score, label, row, size) for (score, label), size in same.items()]
    return {
        name: (
            torch.tensor([one[0] for one in samples], dtype=torch.float64),
            torch.tensor([one[1] for one in samples], dtype=torch.bool),
            torch.tensor([one[2] for one in samples], dtype=torch.long),
            torch.tensor([one[3] for one in samples], dtype=torch.float64),
        )
        for name, samples in (("clip", clips), ("frame", frames))
    }


def _means(pairs: Sequence[Pair], answers: Mapping[str, str]) -> dict[str, Mean]:
    """Measures that are averages over clips, findings or boxes."""
    means = {"clip.judged": _parts([(float(_judged(pair)), 1.0) for pair in pairs])}
    means |= _when_and_where(pairs)
    written = [
        (0, 0) if pair.record.report is None else grounding.raw_boxes(pair.record.report)
        for pair in pairs
    ]
    means["space.invalid_box_rate"] = _parts([(bad, every) for every, bad in written])
    for kind in sorted({one.type for pair in pairs for one in pair.clip.findings}):
        means |= _of_type(kind, pairs)
    means["question.accuracy"] = _parts([_answered(pair.clip, answers) for pair in pairs])
    spent = [
        sum(pair.record.report.timings.values())
        if pair.record.report is not None and pair.record.report.timings
        else math.nan
        for pair in pairs
    ]
    means["cost.seconds_per_clip"] = _plain(spent)
    return means


def _when_and_where(pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Over anomalous clips whose windows are annotated and whose judge was asked where."""

    def over(measure: Callable[[Sequence[Finding], Sequence[Finding]], float]) -> list[float]:
        return [
            measure(_report(pair).findings, pair.clip.findings) if asked else math.nan
            for pair, asked in zip(pairs, wanted, strict=True)
        ]

    wanted = [_located(pair) and bool(pair.clip.findings) for pair in pairs]
    iou = over(grounding.temporal_iou)
    means = {"time.mean_iou": _plain(iou)}
    for least in grounding.RECALL_THRESHOLDS:
        reached = [math.nan if math.isnan(one) else float(one >= least) for one in iou]
        means[f"time.recall_at_{least}"] = _plain(reached)
    means["time.effective_f1"] = _plain(over(grounding.effective_temporal_f1))
    means["time.count_accuracy"] = _plain(over(grounding.count_is_right))
    means["space.box_mean_iou"] = _plain(over(grounding.mean_box_iou))
    tubes = [math.nan] * len(pairs)
    for row, pair in enumerate(pairs):
        if wanted[row]:
            report = _report(pair)
            tubes[row] = grounding.dense_tube_iou(
                report.findings, pair.clip.findings, fps=report.fps, num_frames=report.num_frames
            )
    means["space.tube_mean_iou"] = _plain(tubes)
    return means


def _of_type(kind: str, pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Of the faults of one kind: in clips judged anomalous; found; found under their name."""
    rows: dict[str, list[tuple[float, float]]] = {"recall": [], "found": [], "named": []}
    for pair in pairs:
        faults = [one for one in pair.clip.findings if one.type == kind]
        every = float(len(faults))
        caught = every if _judged(pair) and _report(pair).verdict == VERDICTS[1] else 0.0
        rows["recall"].append((caught, every if _judged(pair) else 0.0))
        said = _report(pair).findings if _located(pair) else ()
        alike = [one for one in said if one.type == kind]
        base = every if _located(pair) else 0.0
        rows["found"].append((float(sum(grounding.is_found(one, said) for one in faults)), base))
        rows["named"].append((float(sum(grounding.is_found(one, alike) for one in faults)), base))
    return {f"type.{kind}.{name}": _parts(parts) for name, parts in rows.items()}


def _answered(clip: AnnotatedClip, answers: Mapping[str, str]) -> tuple[float, float]:
    """Right answers of 1, or of none where the clip has no options or there is no answer.

    An answer is a letter, with or without what stands behind it after a full stop or a bracket.
    """
    said = answers.get(clip.name, answers.get(clip.path))
    if not clip.options or clip.answer is None or said is None:
        return 0.0, 0.0
    letter = said.strip().lstrip("(").upper()
    right = letter[:1] == clip.answer and (len(letter) == 1 or letter[1] in ".):")
    return float(right), 1.0


def _plain(values: Sequence[float]) -> Mean:
    return _parts([(0.0, 0.0) if math.isnan(one) else (one, 1.0) for one in values])


def _parts(parts: Sequence[tuple[float, float]]) -> Mean:
    above, below = zip(*parts, strict=True)
    return torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64)
