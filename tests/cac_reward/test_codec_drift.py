"""The table of what h264 does to scores says in words where there is no figure."""

import json
import math

import torch

from benchmarks.codec_drift import compare, plain, write_table


def test_figures_are_of_the_clips_with_both_scores() -> None:
    before = torch.tensor([0.9, 0.4, 0.2, math.nan])
    found = compare(18, before, torch.tensor([0.8, 0.6, math.nan, 0.5]))
    assert (found.clips, found.unjudged) == (2, 2)
    row = write_table([found]).splitlines()[-1]
    assert row == "| 18 | 2 | 2 | 0.1500 | 0.2000 | 1.0000 | 50.0% |"


def test_without_a_score_the_table_says_so_in_words() -> None:
    found = compare(0, torch.tensor([math.nan, 0.5]), torch.tensor([0.5, math.nan]))
    row = write_table([found]).splitlines()[-1]
    assert row == "| 0 | 0 | 2 |" + " no clip has a score |" * 4
    level = compare(28, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.6]))
    assert "| no order | 0.0% |" in write_table([level])
    text = json.dumps([plain(found)], allow_nan=False)
    assert json.loads(text)[0]["mean"] is None
