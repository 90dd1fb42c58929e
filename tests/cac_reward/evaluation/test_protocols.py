"""Benchmarks on small fixtures, through their importers, against independent computations."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_precision_recall_curve,
)

from cac_reward.__main__ import main
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import ImportSettings, VideoFolder
from cac_reward.data.importers.vau_bench import COLUMNS
from cac_reward.data.importing import import_annotations
from cac_reward.data.storage import annotation_writer
from cac_reward.evaluation.classification import anchored_roc_auc, pr_auc
from cac_reward.evaluation.measuring import Evaluation, evaluate
from cac_reward.evaluation.pairing import Pairing, pair_up
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.protocols import Protocol, known_protocols
from cac_reward.evaluation.published import read_skyra, read_vau_r1
from cac_reward.evaluation.writing import markdown, table, write_html, write_json
from cac_reward.report import Finding, TimeWindow
from cac_reward.video import Video
from tests.cac_reward.evaluation.test_published import write_csv


def imported(kind: str, path: Path, **given: Any) -> list[AnnotatedClip]:
    found = list(import_annotations(kind, [path], ImportSettings(**given)))
    assert all(isinstance(one, AnnotatedClip) for one in found), found
    return found  # type: ignore[return-value]


def measured(
    name: str, clips: list[AnnotatedClip], predictions: dict[str, Prediction]
) -> dict[str, float]:
    protocol = Protocol.load(name)
    kept = [clip for clip in clips if clip.split == protocol.split]
    protocol.check(kept)
    evaluation = evaluate(pair_up(kept, predictions, Path()), protocol=protocol, draws=0)
    values = {one.name: one.estimate.value for one in evaluation.measurements}
    assert [name for name in values if name in protocol.head] == [
        name for name in protocol.head if name in values
    ]
    return values


def answer(p_clean: float, *windows: tuple[float, float], fps: float, frames: int) -> Prediction:
    findings = tuple(Finding("jump", TimeWindow(*one)) for one in windows)
    return Prediction(
        judge="j", p_clean=p_clean, located=True, findings=findings, fps=fps, num_frames=frames
    )


def frame_arrays(
    clips: list[tuple[int, list[tuple[int, int]], float, list[tuple[int, int]]]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels and scores of each video, filled in frame by frame; windows in frames."""
    found = []
    for frames, true, p_clean, said in clips:
        labels, scores = np.zeros(frames, int), np.full(frames, 0.0 if said else 1 - p_clean)
        for first, stop in true:
            labels[first:stop] = 1
        for first, stop in said:
            scores[first:stop] = 1 - p_clean
        found.append((torch.from_numpy(labels), torch.from_numpy(scores)))
    return found


# Length, true frames, P(clean), frames of the judge's windows.
SCENES = [
    (300, [(60, 120), (200, 260)], 0.2, [(90, 240)]),
    (240, [(0, 30)], 0.4, []),
    (150, [], 0.7, []),
    (90, [], 0.3, [(30, 60)]),
    (60, [(0, 60)], 0.6, [(30, 60)]),
]


def scene_answers(fps: float, names: list[str]) -> dict[str, Prediction]:
    return {
        name: answer(
            p_clean, *((first / fps, stop / fps) for first, stop in said), fps=fps, frames=frames
        )
        for name, (frames, _, p_clean, said) in zip(names, SCENES, strict=True)
    }


def test_ucf_crime(tmp_path: Path) -> None:
    names = [
        "Abuse1_x264",
        "Arson2_x264",
        "Normal_Videos_3_x264",
        "Normal_4_x264",
        "Fighting5_x264",
    ]
    kinds = ["Abuse", "Arson", "Normal", "Normal", "Robbery"]
    lines = []
    for name, kind, (_, true, _, _) in zip(names, kinds, SCENES, strict=True):
        frames = [str(one) for pair in true for one in pair] + ["-1"] * (4 - 2 * len(true))
        lines.append(f"{name}.mp4  {kind}  {'  '.join(frames)}\n")
    file = tmp_path / "annotation.txt"
    file.write_text("".join(lines))
    clips = imported("ucf_crime", file, fps=30.0)
    values = measured("ucf_crime", clips, scene_answers(30.0, [f"{one}.mp4" for one in names]))
    arrays = frame_arrays(SCENES)
    labels, scores = (torch.cat([one[i] for one in arrays]) for i in (0, 1))
    assert values["frame.roc_auc"] == pytest.approx(binary_auroc(scores, labels).item())
    assert values["frame.f1"] == pytest.approx(binary_f1_score(scores, labels).item())
    said, true = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 1])
    assert values["clip.f1"] == pytest.approx(binary_f1_score(said, true).item())


def test_xd_violence(tmp_path: Path) -> None:
    stems = ["v1__#0_label_B1-0-0", "v2__#0_label_G-0-0", "v3_label_A", "v4_label_A"]
    stems += ["v5__#0_label_B2-0-0"]
    for stem, (frames, *_) in zip(stems, SCENES, strict=True):
        Video(torch.zeros(frames, 3, 16, 16, dtype=torch.uint8), 24.0).save(
            tmp_path / f"{stem}.mp4"
        )
    file = tmp_path / "annotations.txt"
    file.write_text(
        "".join(
            f"{stem} {' '.join(str(one) for pair in true for one in pair)}\n"
            for stem, (_, true, _, _) in zip(stems, SCENES, strict=True)
            if true
        )
    )
    clips = imported("xd_violence", file, videos=VideoFolder(tmp_path), split="test")
    assert sum(clip.verdict == "clean" for clip in clips) == 2
    values = measured("xd_violence", clips, scene_answers(24.0, [f"{one}.mp4" for one in stems]))
    arrays = frame_arrays(SCENES)
    labels, scores = (torch.cat([one[i] for one in arrays]) for i in (0, 1))
    expected = binary_average_precision(scores, labels).item()
    assert values["frame.average_precision"] == pytest.approx(expected)
    precision, recall, _ = binary_precision_recall_curve(scores, labels)
    area = -torch.trapezoid(precision, recall).item()
    assert values["frame.pr_auc"] == pytest.approx(area)
    assert area > expected + 0.01
    # As the file alone is imported, there is nothing clean to tell from.
    alone = imported("xd_violence", file, fps=24.0)
    with pytest.raises(ValueError, match="must hold clean clips for XD-Violence, got none among 3"):
        measured("xd_violence", alone, {})


def test_shanghaitech(tmp_path: Path) -> None:
    names = [f"0{number}_0001" for number in range(1, 6)]
    for name, (frames, true, _, _) in zip(names, SCENES, strict=True):
        mask = np.zeros(frames, np.uint8)
        for first, stop in true:
            mask[first:stop] = 1
        np.save(tmp_path / f"{name}.npy", mask)
    clips = imported("shanghaitech", tmp_path, fps=24.0)
    assert [clip.num_frames for clip in clips] == [scene[0] for scene in SCENES]
    predictions = scene_answers(24.0, names)
    # What was judged elsewhere may not say how long the clip was: the mask does.
    predictions[names[0]] = replace(predictions[names[0]], fps=None, num_frames=None)
    values = measured("shanghaitech", clips, predictions)
    arrays = frame_arrays(SCENES)
    labels, scores = (torch.cat([one[i] for one in arrays]) for i in (0, 1))
    assert values["frame.roc_auc"] == pytest.approx(binary_auroc(scores, labels).item())
    ends = torch.tensor([0, 1])
    each = [
        binary_auroc(torch.cat([ends.double(), score]), torch.cat([ends, label])).item()
        for label, score in arrays
    ]
    assert values["frame.macro_roc_auc"] == pytest.approx(sum(each) / 5, abs=1e-6)
    assert abs(values["frame.macro_roc_auc"] - values["frame.roc_auc"]) > 0.01


def vau_row(name: str, kind: str, start: str, end: str, option: str) -> dict[str, str]:
    values = dict.fromkeys(COLUMNS, "x") | {"Video Name": name, "Anomaly Class": kind}
    values |= {f"Option {number}": f"o{number}" for number in range(1, 5)}
    return values | {"Start Time": start, "End Time": end, "Correct Option": option}


def published_tag(
    windows: list[tuple[float, float]], said: list[tuple[float, float]]
) -> list[float]:
    """IoU of single intervals as the published evaluation takes it: over the hull, 0 if empty."""
    found = []
    for (start, end), (first, last) in zip(windows, said, strict=True):
        if first == last:
            found.append(0.0)
            continue
        both = max(0.0, min(end, last) - max(start, first))
        found.append(both / (max(end, last) - min(start, first)))
    return found


def test_vau_bench(tmp_path: Path) -> None:
    rows = [
        vau_row("ucf_a.mp4", "Fire", "2", "10", "A"),
        vau_row("b.mp4", "Robbery", "0", "4", "B"),
        vau_row("c.mp4", "Abuse", "5", "6", "C"),
        vau_row("d.mp4", "Normal", "0", "0", "D"),
        vau_row("e.mp4", "People_falling", "-1", "-1", "A"),
        vau_row("f.mp4", "Fighting", "1", "3", "B"),
    ]
    # The clip lies under the name that its own data set gives it.
    Video(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 8.0).save(tmp_path / "a.mp4")
    clips = imported(
        "vau_bench", write_csv(tmp_path / "test_x.csv", *rows), videos=VideoFolder(tmp_path)
    )
    assert clips[0].path == "a.mp4"
    tag = write_csv(
        tmp_path / "tag.csv",
        {"Video Name": "ucf_a.mp4", "Temporal Grounding": "<glue>[0:04, 0:09.5]</glue>"},
        {"Video Name": "b.mp4", "Temporal Grounding": "from [2, 4] on"},
        {"Video Name": "c.mp4", "Temporal Grounding": "<glue>[-1.0, -1.0]</glue>"},
        {"Video Name": "d.mp4", "Temporal Grounding": "<glue>[0, 1]</glue>"},
        {"Video Name": "e.mp4", "Temporal Grounding": "<glue>[0, 1]</glue>"},
    )
    cls = write_csv(
        tmp_path / "cls.csv",
        {"Video Name": "ucf_a.mp4", "CLS answer": "<answer>fire</answer>"},
        {"Video Name": "b.mp4", "CLS answer": "Stealing"},
        {"Video Name": "d.mp4", "CLS answer": "Normal"},
        {"Video Name": "e.mp4", "CLS answer": "nothing of the kind"},
    )
    qa = write_csv(
        tmp_path / "qa.csv",
        {"Video Name": "ucf_a.mp4", "QA answer": "A"},
        {"Video Name": "b.mp4", "QA answer": "<answer>B</answer>"},
        {"Video Name": "c.mp4", "QA answer": ""},
    )
    values = measured("vau_bench", clips, read_vau_r1([tag, cls, qa]))
    # f.mp4 has no answer at all, and takes no part in grounding only.
    iou = published_tag([(2, 10), (0, 4), (5, 6)], [(4, 9.5), (2, 4), (0, 0)])
    assert iou == [5.5 / 8, 0.5, 0]
    assert values["time.mean_iou"] == pytest.approx(sum(iou) / 3)
    for least in (0.3, 0.5, 0.7):
        reached = sum(one >= least for one in iou) / 3
        assert values[f"time.recall_at_{least}"] == pytest.approx(reached)
    assert values["question.accuracy_of_all"] == pytest.approx(2 / 6)
    assert values["question.accuracy"] == pytest.approx(2 / 2)
    assert values["class.accuracy"] == pytest.approx(2 / 6)
    assert values["class.binary_accuracy"] == pytest.approx(3 / 6)


def balanced(pairs: list[tuple[str, str]]) -> tuple[float, float, float]:
    """Balanced accuracy, recall and F1 of fakes, of (said of the real one, of the fake one)."""
    tn = sum(real == "Real" for real, _ in pairs)
    tp = sum(fake == "Fake" for _, fake in pairs)
    total = len(pairs)
    f1 = 2 * tp / (2 * tp + (total - tn) + (total - tp))
    return (tn / total + tp / total) / 2, tp / total, f1


def test_vif_bench(tmp_path: Path) -> None:
    generator = random.Random(3)
    said = {}
    for model, count in (("real", 6), ("kling-v1", 6), ("sora-2", 4)):
        for number in range(count):
            said[f"{model}/v{number}"] = generator.choice(["Real", "Fake", "Fake, surely"])
    index: dict[str, list[str]] = {}
    for name in said:
        index.setdefault(name.split("/")[0], []).append(f"/data/test_normalized/{name}")
    file = tmp_path / "test_index.json"
    file.write_text(json.dumps(index))
    clips = imported("vif_bench", file)
    results = [
        {
            "video_id": name,
            "mllm_model_name": "m",
            "response": f"<think></think><answer>{verdict}</answer>",
        }
        for name, verdict in said.items()
    ]
    (tmp_path / "out.json").write_text(json.dumps(results))
    predictions = read_skyra([tmp_path / "out.json"])
    values = measured("vif_bench", clips, predictions)
    each = []
    for model in ("kling-v1", "sora-2"):
        pairs = [
            (said[f"real/{name.split('/')[1]}"], verdict.split(",")[0])
            for name, verdict in said.items()
            if name.startswith(model)
        ]
        each.append(balanced(pairs))
        for name, value in zip(("accuracy", "recall", "f1"), each[-1], strict=True):
            assert values[f"generator.{model}.{name}"] == pytest.approx(value)
    assert each[0] != each[1]
    for place, name in enumerate(("accuracy", "recall", "f1")):
        expected = (each[0][place] + each[1][place]) / 2
        assert values[f"generators.{name}"] == pytest.approx(expected)
    # An answer that says neither is wrong, on either side.
    right = next(name for name, one in said.items() if name.startswith("sora") and one != "Real")
    predictions[right] = replace(predictions[right], p_clean=None, failure="?")
    lost = measured("vif_bench", clips, predictions)
    assert lost["generator.sora-2.recall"] == pytest.approx(each[1][1] - 1 / 4)


def test_areas_against_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 6, (40,), generator=generator).double() / 5
        labels = torch.rand(40, generator=generator) < 0.4
        weights = torch.randint(0, 3, (40,), generator=generator).double()
        times = weights.long()
        many = scores.repeat_interleave(times), labels.repeat_interleave(times).long()
        precision, recall, _ = binary_precision_recall_curve(*many)
        area = -torch.trapezoid(precision, recall).item()
        assert pr_auc(scores, labels, weights) == pytest.approx(area, abs=1e-6)
        ends = torch.tensor([0.0, 1.0]).double()
        anchored = binary_auroc(torch.cat([ends, many[0]]), torch.cat([ends.long(), many[1]]))
        found = anchored_roc_auc(scores, labels, weights)
        assert found == pytest.approx(anchored.item(), abs=1e-6)
    one = torch.tensor([0.3]).double()
    assert np.isnan(pr_auc(one, torch.tensor([False]), torch.ones(1)))


@pytest.mark.parametrize("name", known_protocols())
def test_every_protocol_says_what_it_is(name: str) -> None:
    protocol = Protocol.load(name)
    assert protocol.importer == name
    assert protocol.split == "test"


def test_there_is_a_protocol_for_each_benchmark() -> None:
    assert known_protocols() == [
        "shanghaitech",
        "ucf_crime",
        "vau_bench",
        "vif_bench",
        "xd_violence",
    ]


OWN = """
benchmark: Mine
source: here
importer: cvat
split: holdout
head: [clip.recall]
needs: [clean]
remedy: annotate some
rules: ["one"]
"""


def test_a_protocol_of_ones_own_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    assert Protocol.load(str(file)).head == ("clip.recall",)
    for old, new, message in (
        ("rules:", "ruling:", "must have 'rules'"),
        ("needs: [clean]", "needs: [clear]", "needs must be among clean, .*, got 'clear'"),
        ("split: holdout", "split: 3", "split must be text, got 3"),
        ('rules: ["one"]', "rules: []", "rules must not be empty"),
        ("head: [clip.recall]", "head: clip.recall", "head must be a list"),
        ("benchmark: Mine", "benchmark: [", "own.yaml"),
    ):
        file.write_text(OWN.replace(old, new))
        with pytest.raises(ValueError, match=message):
            Protocol.load(str(file))
    with pytest.raises(FileNotFoundError, match=r"existing file, got .*none\.yaml"):
        Protocol.load(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"protocol must be one of shanghaitech, .*got 'ucf'"):
        Protocol.load("ucf")


def small(head: str = "clip.recall") -> Evaluation:
    clips = [AnnotatedClip(path="a.mp4", verdict="clean", split="test")]
    protocol = replace(Protocol.load("ucf_crime"), head=(head, "clip.recall", "clip.accuracy"))
    found = pair_up(clips, {"a.mp4": Prediction(judge="<b>", p_clean=0.9)}, Path())
    return evaluate(found, protocol=protocol, draws=0)


def test_the_benchmarks_figures_head_every_table(tmp_path: Path) -> None:
    evaluation = small("clip.judged")
    shown = table(evaluation)
    assert shown.index("UCF-Crime, split test") < shown.index("clip.judged")
    assert shown.index("clip.accuracy") < shown.index("Everything else")
    # A figure without a value is the first of those without one.
    assert "without a value: clip.recall" in shown
    text = markdown(evaluation)
    assert text.startswith("# Evaluation of &lt;b> on UCF-Crime\n")
    assert f"* {Protocol.load('ucf_crime').rules[0]}" in text
    write_json(tmp_path / "out.json", evaluation)
    plain = json.loads((tmp_path / "out.json").read_text())
    assert plain["schema_version"] == 2
    assert plain["protocol"]["head"] == ["clip.judged", "clip.recall", "clip.accuracy"]
    write_html(tmp_path / "out.html", evaluation)
    page = (tmp_path / "out.html").read_text()
    assert page.index("UCF-Crime, split test") < page.index("clip.accuracy")
    assert "<b>" not in page.split("<body>")[1].split("</h1>")[0]


def test_a_head_that_is_no_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head must name measures, got 'clip\.acuracy'"):
        small("clip.acuracy")


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="pairing must hold at least one pair"):
        evaluate(Pairing((), (), ()))


def test_the_command_takes_split_format_and_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [vau_row("a.mp4", "Fire", "2", "10", "A"), vau_row("b.mp4", "Normal", "0", "0", "B")]
    clips = imported("vau_bench", write_csv(tmp_path / "test_x.csv", *rows))
    with annotation_writer(tmp_path / "clips.jsonl") as write:
        for clip in clips:
            write(clip)
        write(AnnotatedClip(path="c.mp4", split="train", verdict="clean"))
    tag = write_csv(
        tmp_path / "tag.csv",
        {"Video Name": "a", "Temporal Grounding": "<answer>Anomaly</answer><glue>[2, 6]</glue>"},
        {"Video Name": "b", "Temporal Grounding": "<answer>Normal</answer><glue>[-1, -1]</glue>"},
    )
    given = ["evaluate", "--annotations", str(tmp_path / "clips.jsonl"), "--draws", "0"]
    given += ["--predictions", str(tag)]
    assert main([*given, "--predictions-format", "vau_r1", "--protocol", "vau_bench"]) == 0
    printed = capsys.readouterr().out
    assert "VAU-Bench, split test" in printed
    assert re.search(r"time\.mean_iou +0\.5000", printed)
    assert "2  annotated clips" in printed
    for more, message in (
        (["--protocol", "vau_bench"], "must hold one record per line"),
        (["--predictions-format", "vau_r1", "--protocol", "none"], "protocol must be one of"),
        (["--predictions-format", "skyra"], "JSON must go on"),
        (
            ["--split", "train", "--protocol", "ucf_crime"],
            "must hold anomalous clips for UCF-Crime",
        ),
    ):
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    judged = ["evaluate", "--annotations", str(tmp_path / "clips.jsonl"), "--judge", "x"]
    assert main([*judged, "--predictions-format", "skyra", "--output", str(tmp_path / "o")]) == 2
    assert "predictions_format must be left out with judge" in capsys.readouterr().err
