"""The measures of verdicts against torchmetrics and against counting pairs."""

import math

import pytest
import torch
import torchmetrics.functional.classification as reference
from torch import Tensor

from cac_reward.evaluation.classification import (
    average_precision,
    calibration_error,
    rates,
    roc_auc,
)


def samples(seed: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Scores with many ties, among them 0.5, and truths of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 11, (count,), generator=generator).double() / 10
    return scores, torch.rand(count, generator=generator) < 0.3 + 0.4 * scores


@pytest.mark.parametrize("seed", range(5))
def test_measures_equal_torchmetrics(seed: int) -> None:
    scores, truth = samples(seed)
    ones = torch.ones(len(scores))
    ours = rates(scores, truth, ones)
    said = (scores > 0.5).int()
    assert ours["accuracy"] == pytest.approx(reference.binary_accuracy(said, truth.int()).item())
    assert ours["precision"] == pytest.approx(reference.binary_precision(said, truth.int()).item())
    assert ours["recall"] == pytest.approx(reference.binary_recall(said, truth.int()).item())
    assert ours["f1"] == pytest.approx(reference.binary_f1_score(said, truth.int()).item())
    both = reference.multiclass_accuracy(said, truth.int(), num_classes=2, average="macro")
    assert ours["balanced_accuracy"] == pytest.approx(both.item())
    area = reference.binary_auroc(scores, truth.int()).item()
    assert roc_auc(scores, truth, ones) == pytest.approx(area)
    precision = reference.binary_average_precision(scores, truth.int()).item()
    assert average_precision(scores, truth, ones) == pytest.approx(precision)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    scores, truth = samples(seed, 25)
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[truth].tolist()
        for low in scores[~truth].tolist()
    ]
    expected = sum(pairs) / len(pairs)
    assert roc_auc(scores, truth, torch.ones(len(scores))) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [roc_auc, average_precision, calibration_error])
def test_a_weight_is_a_number_of_copies(measure) -> None:
    scores, truth = samples(7)
    weights = torch.randint(0, 4, (len(scores),), generator=torch.Generator().manual_seed(1))
    many = scores.repeat_interleave(weights), truth.repeat_interleave(weights)
    whole = measure(*many, torch.ones(len(many[0])))
    assert measure(scores, truth, weights) == pytest.approx(whole)
    assert whole != pytest.approx(measure(scores, truth, torch.ones(len(scores))))
    assert rates(scores, truth, weights) == pytest.approx(rates(*many, torch.ones(len(many[0]))))


def test_without_a_base_there_is_no_number() -> None:
    scores, ones = torch.tensor([0.1, 0.2]), torch.ones(2)
    clean = torch.tensor([False, False])
    found = rates(scores, clean, ones)
    assert found["accuracy"] == 1
    assert math.isnan(found["precision"])
    assert math.isnan(found["recall"])
    assert math.isnan(found["balanced_accuracy"])
    assert math.isnan(found["f1"])
    assert math.isnan(roc_auc(scores, clean, ones))
    assert math.isnan(average_precision(scores, clean, ones))
    assert math.isnan(calibration_error(scores, clean, torch.zeros(2)))


@pytest.mark.parametrize(
    ("scores", "truth", "weights", "message"),
    [
        ([0.1], [True, False], [1, 1], "one number for each sample"),
        ([math.nan], [True], [1], "leave out what was not judged"),
        ([1.5], [True], [1], r"in \[0, 1\]"),
        ([0.5], [True], [-1], "weights must be at least 0"),
    ],
)
def test_what_is_no_sample_is_refused(scores, truth, weights, message: str) -> None:
    given = torch.tensor(scores), torch.tensor(truth), torch.tensor(weights)
    for measure in (rates, roc_auc, average_precision, calibration_error):
        with pytest.raises(ValueError, match=message):
            measure(*given)


def test_a_calibration_error_takes_whole_weights() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        calibration_error(torch.tensor([0.5]), torch.tensor([True]), torch.tensor([0.5]))
