"""torchmetrics' own Metric."""

import copy
import subprocess
import sys

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from cac_reward.adapters import torchmetrics as module
from tests.cac_reward.adapters.stub_scorer import FPS, UNJUDGED, StubScorer, as_float, clip


def batch(*reds: int, num_frames: int = 3) -> torch.Tensor:
    """[B C F H W] in [0, 1], torchmetrics' layout of videos."""
    frames = torch.stack([as_float(clip(red, num_frames)) for red in reds])
    return frames.permute(0, 2, 1, 3, 4)


def test_without_torchmetrics_it_says_what_to_do() -> None:
    program = (
        "import sys\n"
        "sys.modules['torchmetrics'] = None\n"
        "from cac_reward.adapters import torchmetrics\n"
        "try:\n    torchmetrics.CaCMetric\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    wanted = "CaCMetric needs torchmetrics: pip install torchmetrics"
    assert (run.stdout.strip(), run.stderr) == (wanted, "")


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Metric'"):
        _ = module.Metric


@pytest.mark.parametrize("num_frames", [3, 5])
def test_mean_over_updates(num_frames: int) -> None:
    scorer = StubScorer()
    metric = module.CaCMetric(scorer, fps=FPS)
    metric.update(batch(51, 102, num_frames=num_frames), ["a", "b"])
    metric.update(batch(204, num_frames=num_frames))
    torch.testing.assert_close(metric.compute(), torch.tensor((0.2 + 0.4 + 0.8) / 3))
    wanted = batch(51, 102, num_frames=num_frames).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(scorer.seen[0][0], wanted)
    metric.reset()
    assert metric.update_count == 0
    torch.testing.assert_close(metric(batch(51), ["a"]), torch.tensor(0.2))  # forward


def test_it_is_a_metric_that_can_be_copied_and_collected() -> None:
    metric = module.CaCMetric(StubScorer(), fps=FPS)
    assert isinstance(metric, Metric)
    assert (metric.higher_is_better, metric.is_differentiable) == (True, False)
    metric.update(batch(51))
    other = copy.deepcopy(metric)
    other.update(batch(102))
    torch.testing.assert_close(metric.compute(), torch.tensor(0.2))
    torch.testing.assert_close(other.compute(), torch.tensor(0.3))
    both = MetricCollection({"all": metric.clone(), "more": metric.clone()})
    both.update(batch(102), ["a"])
    assert set(both.compute()) == {"all", "more"}


def test_states_add_up_over_processes() -> None:
    metrics = [module.CaCMetric(StubScorer(), fps=FPS, on_failure="mask") for _ in range(2)]
    metrics[0].update(batch(51, UNJUDGED))
    metrics[1].update(batch(102))
    metrics[0]._reduce_states(
        {name: getattr(metrics[1], name) for name in ("total", "count", "failed")}
    )
    torch.testing.assert_close(metrics[0].compute(), torch.tensor(0.3))
    assert metrics[0].failed == 1


def test_failures() -> None:
    metric = module.CaCMetric(StubScorer(), fps=FPS)
    metric.update(batch(UNJUDGED, 51))
    torch.testing.assert_close(metric.compute(), torch.tensor(0.2))
    assert (metric.count, metric.failed) == (1, 1)
    metric = module.CaCMetric(StubScorer(), fps=FPS, on_failure=0)
    metric.update(batch(UNJUDGED, 51))
    torch.testing.assert_close(metric.compute(), torch.tensor(0.1))
    assert (metric.count, metric.failed) == (2, 1)
    metric = module.CaCMetric(StubScorer(), fps=FPS, on_failure="raise")
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        metric.update(batch(UNJUDGED, 51))


def test_the_sum_keeps_small_scores_beside_a_large_total() -> None:
    metric = module.CaCMetric(StubScorer(), fps=FPS)
    metric.total += 2**24  # Float32 has no number between this and the next integer.
    metric.update(batch(51))
    assert metric.total.item() - 2**24 == pytest.approx(0.2)


def test_a_missing_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        module.CaCMetric(StubScorer(), fps=None)
