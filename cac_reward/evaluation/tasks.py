"""Questions, classes and paired generators: tasks of benchmarks beside verdicts and places.

'Of all' means that a missing or unreadable answer is wrong, as benchmarks count; where nobody was
asked at all there is no value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from cac_reward.data.annotations import LETTERS
from cac_reward.evaluation.pairing import Pair
from cac_reward.evaluation.sums import Mean, mean_of, ratio
from cac_reward.report import VERDICTS

NORMAL = "normal"
"""How data sets call the class of clean clips, in small letters."""


def questions(pairs: Sequence[Pair], answers: Mapping[str, str]) -> dict[str, Mean]:
    """Right answers to multiple-choice questions.

    An answer is a letter, with or without what stands behind it after a full stop or a bracket.

    Args:
        pairs: N clips and what was answered.
        answers: By the clips' names; where there is none, the predictions' own.
    """
    right = []
    for pair in pairs:
        clip = pair.clip
        said = answers.get(clip.name, answers.get(clip.path, pair.prediction.option))
        asked = bool(clip.options) and clip.answer is not None
        right.append(math.nan if not asked or said is None else _is_letter(said, str(clip.answer)))
    wanted = [bool(pair.clip.options) and pair.clip.answer is not None for pair in pairs]
    return {
        "question.accuracy": mean_of(right),
        "question.accuracy_of_all": mean_of(_of_all(right, wanted)),
    }


def classes(pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Right classes of all clips that have one, and whether the clip's class is 'normal' or not."""
    wanted = [pair.clip.category is not None for pair in pairs]
    exact, binary = [], []
    for pair in pairs:
        true, said = pair.clip.category, pair.prediction.category
        if true is None or said is None:
            exact.append(math.nan)
            binary.append(math.nan)
            continue
        exact.append(float(_plain_name(true) == _plain_name(said)))
        binary.append(float((_plain_name(true) == NORMAL) == (_plain_name(said) == NORMAL)))
    return {
        "class.accuracy": mean_of(_of_all(exact, wanted)),
        "class.binary_accuracy": mean_of(_of_all(binary, wanted)),
    }


def generators(pairs: Sequence[Pair]) -> dict[str, dict[str, Mean]]:
    """For each measure and generator: every generated clip beside the real one it belongs to.

    A generated clip is an anomalous one, its generator the last part of its source, its real
    counterpart the clean clip of the same origin. accuracy is the balanced one over the pairs,
    recall and f1 are those of generated clips. A missing answer is wrong on either side.
    """
    clean: dict[str, Pair] = {}
    for pair in pairs:
        if pair.clip.verdict == VERDICTS[0]:
            clean.setdefault(pair.clip.origin, pair)
    kinds = [_generator(pair) if pair.clip.origin in clean else None for pair in pairs]
    found: dict[str, dict[str, Mean]] = {"accuracy": {}, "recall": {}, "f1": {}}
    for kind in sorted({one for one in kinds if one is not None}):
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for pair, own in zip(pairs, kinds, strict=True):
            if own != kind:
                for row in rows.values():
                    row.append((0.0, 0.0))
                continue
            real = float(clean[pair.clip.origin].prediction.verdict == VERDICTS[0])
            fake = float(pair.prediction.verdict == VERDICTS[1])
            rows["accuracy"].append(((real + fake) / 2, 1.0))
            rows["recall"].append((fake, 1.0))
            # 2 TP over 2 TP + FP + FN.
            rows["f1"].append((2 * fake, 2 * fake + (1 - real) + (1 - fake)))
        for name, row in rows.items():
            found[name][kind] = ratio(row)
    return found


def _generator(pair: Pair) -> str | None:
    source = pair.clip.source.rpartition("/")[2]
    return (source or "unnamed") if pair.clip.verdict == VERDICTS[1] else None


def _of_all(right: Sequence[float], wanted: Sequence[bool]) -> list[float]:
    """0 in the place of what is missing, where anything was answered at all."""
    if all(math.isnan(one) for one in right):
        return list(right)
    return [
        0.0 if asked and math.isnan(one) else one for one, asked in zip(right, wanted, strict=True)
    ]


def _is_letter(said: str, letter: str) -> float:
    text = said.strip().lstrip("(").upper()
    named = text[:1] in tuple(LETTERS) and (len(text) == 1 or text[1] in ".):")
    return float(named and text[0] == letter)


def _plain_name(category: str) -> str:
    return re.sub(r"[\s_]+", "_", category.strip().lower())
