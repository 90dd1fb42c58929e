"""What each stage and each turn of the judge is worth, on toy clips with exact truth.

    python -m examples.toy_world.annotated_clips --sets mixed reflected rendered held_out \\
        held_out_small held_out_colours held_out_sizes held_out_speeds held_out_faults
    python -m benchmarks.judge_ablation --seeds 0 1 2

    python -m examples.toy_world.annotated_clips --scale large --output runs/toy_clips_large \\
        --sets mixed reflected rendered held_out held_out_small held_out_colours held_out_sizes \\
        held_out_speeds held_out_faults
    python -m benchmarks.judge_ablation --scale large --device cuda --batch 32

Every variant starts from the same judge that has learnt what single frames show, learns from the
same clips for as many updates, and is measured on the same held-out clips. What is finished is not
run again, so variants may be run in several processes; `judge_ablation_table.py` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.judge_verdicts import Verdict, write_verdicts
from cac_reward.answers import AnswerError, parse_findings
from cac_reward.evaluation.grounding import mean_box_iou, temporal_iou
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import FINDINGS_PREFIX, VERDICT_CHOICES, VERDICT_PREFIX
from cac_reward.report import UNSPECIFIED, Finding
from cac_reward.scorer import CaCScorer
from cac_reward.training.classifier import Classifier
from cac_reward.training.clips import ClipStore
from cac_reward.training.curricula import load_curriculum
from cac_reward.training.lesson_kinds import open_task, open_whole
from cac_reward.training.lessons import ClipInView, LessonOptions, View
from cac_reward.training.settings import build_stage
from cac_reward.training.stages import run_stage
from cac_reward.training.task_answers import Task, parse_task_answer
from examples.toy_world.base_judge import build_base
from examples.toy_world.scales import SCALES, Scale

RECIPE = "configs/reward/toy_stages.yaml"
"""Its first stage is single-frame SFT."""
TOGETHER = 32
"""Lessons of an update."""
SETS = ("held_out", "held_out_small")
UNSEEN = ("held_out_colours", "held_out_sizes", "held_out_speeds", "held_out_faults")
COMMON: dict[str, Any] = {
    "model": {
        "dtype": "float32",
        "attention": "sdpa",
        "learns": "all",
        "gradient_checkpointing": False,
    },
    "data": {"train": ["mixed.jsonl"], "workers": 1},
    "optimizer": {"name": "muon", "learning_rate": 1e-3, "warmup": 20},
    # Every judge that learns from written answers also hears what each frame shows.
    "loss": {"captions": 1.0},
}
GRPO: dict[str, Any] = {
    "trainer": "grpo",
    "loss": {"captions": 0.0},
    "model": {"attention": "sdpa"},
    "data": {"workers": 0, "anomalous_share": 0.5},
    "lessons": {"inspect": 1.0},
    # At temperature 1 these judges answer so much worse than unsampled that what pays there, such
    # as wide windows, does not pay at work: docs/results/judge.md.
    "rollout": {"group": 8, "max_call_tokens": 48, "max_answer_tokens": 160, "temperature": 0.25},
    "optimizer": {"name": "adamw", "learning_rate": 3e-5, "schedule": "constant", "warmup": 0},
    "batch": 128,
    "accumulation": 1,
}
AT_ONE: dict[str, Any] = {
    "updates": 60,
    "rollout": {"temperature": 1.0},
    "optimizer": {"learning_rate": 1e-4},
    "batch": 64,
    "bf16": False,
}


@dataclass(frozen=True)
class Variant:
    """One way to train a judge."""

    start: str
    """Variant that it goes on from, 'frames' for single-frame SFT, 'random' for none."""
    stage: Mapping[str, Any]
    reads: str = "two_turns"
    """How its verdict is read, of _READERS."""
    sets: tuple[str, ...] = SETS


TWICE = {"scan": 0.65, "inspect": 0.35}
TWO_TURNS: dict[str, Any] = {"lessons": TWICE, "loss": {"frames": 1.0, "decision_words": 4.0}}
VERDICT: dict[str, Any] = {"lessons": {"verdict": 1.0}, "loss": {"decision_words": 4.0}}
WHOLE: dict[str, Any] = {
    "lessons": {"whole": 1.0},
    "loss": {"frames": 1.0, "decision_words": 4.0},
}
GROUND: dict[str, Any] = {
    "lessons": {"grounding": 1.0},
    "loss": {"frames": 1.0},
    "data": {"train": ["reflected.jsonl"]},
}
HEADS: dict[str, Any] = {
    "lessons": {"scan": 1.0},
    "loss": {"words": 0.0, "frames": 1.0, "clip": 1.0, "captions": 0.0},
    "model": {"learns": "heads"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-2},
}
REWARDS = {"accuracy": 1.0, "temporal_iou": 1.0, "spatial_iou": 1.0, "format": 0.5}
EVERYWHERE = (*SETS, *UNSEEN)


@dataclass(frozen=True)
class Bench:
    """Where everything is, and how large."""

    scale: str = "small"
    """Of `SCALES`."""
    device: str = "cpu"
    """Where finished judges are asked."""
    batch: int = 8
    """Lessons of a pass; an update has TOGETHER."""
    frames: int = 1200
    """Updates of single-frame SFT."""

    def place(self, name: str) -> Path:
        """A folder of this scale below runs/."""
        return Path("runs", name if self.scale == "small" else f"{name}_{self.scale}")

    @property
    def clips(self) -> Path:
        return self.place("toy_clips")

    def folder(self, name: str, seed: int) -> Path:
        """Of one judge."""
        return self.place("judge_ablation") / name / f"seed_{seed}"

    def base(self) -> Path:
        """Random weights."""
        folder = self.place("toy_judge") / "base"
        if not (folder / "config.json").is_file():
            build_base(folder, scale=SCALES[self.scale])
        return folder

    def single_frame(self) -> Path:
        """A judge that has learnt what single frames show; trained if it is not there."""
        base = self.base()
        own = [f"output={base.parent}", f"1.model.path={base}"]
        own += [f"1.data.train=[{self.clips}/rendered.jsonl]", f"1.updates={self.frames}"]
        return run_stage(load_curriculum(RECIPE, own)[0]).judge


def variants(updates: int, grpo: int, scale: Scale) -> dict[str, Variant]:
    """All of them, in the order of the table."""
    whole_scan = {"fps": scale.world.fps, "max_frames": scale.world.num_frames + 3}
    whole = {**WHOLE, "judge": {"scan": {**whole_scan, "pixels": scale.whole_side**2}}}

    def learn(stage: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"updates": updates, **stage, **more}

    def reward(*less: str) -> dict[str, Any]:
        kept = {name: weight for name, weight in REWARDS.items() if name not in less}
        return {**GRPO, "updates": grpo, "rewards": kept}

    silent = {"decision_words": 4.0, "captions": 0.0}
    frames, twice = "frames", "two_turns"
    accuracy_only = reward("temporal_iou", "spatial_iou", "format")
    return {
        # As rivals do: from verdicts alone.
        "yes_no": Variant(frames, learn(VERDICT, loss=silent), "verdict"),
        # The same, which also hears what each frame shows.
        "yes_no_captions": Variant(frames, learn(VERDICT), "verdict"),
        "one_turn": Variant(frames, learn(whole), "one_turn"),
        "two_turns": Variant(frames, learn(TWO_TURNS), sets=EVERYWHERE),
        "no_single_frame": Variant("random", learn(TWO_TURNS)),
        "thinking_free": Variant(frames, learn(TWO_TURNS, options={"reasons": 0.0})),
        "no_frame_head": Variant(frames, learn(TWO_TURNS, loss={"decision_words": 4.0})),
        # VAU-R1's question of one turn, and SRVAU-R1's way to answer it.
        "grounding": Variant(frames, learn(GROUND, options={"thinking": 0.0}), "grounding"),
        "reflection": Variant(
            frames, learn(GROUND, options={"thinking": 0.0, "reflection": 1.0}), "reflection"
        ),
        "classifier": Variant(frames, learn(HEADS), "heads"),
        "grpo": Variant(twice, reward(), sets=EVERYWHERE),
        "grpo_at_one": Variant(twice, dict(OmegaConf.merge(reward(), AT_ONE))),
        "grpo_no_temporal": Variant(twice, reward("temporal_iou")),
        "grpo_no_spatial": Variant(twice, reward("spatial_iou")),
        "grpo_accuracy": Variant(twice, accuracy_only),
    }


def train(name: str, table: Mapping[str, Variant], seed: int, bench: Bench) -> tuple[Path, float]:
    """Train a variant, and what it starts from; its judge and the seconds it took."""
    variant = table[name]
    if variant.start == "random":
        start = bench.base()
    elif variant.start == "frames":
        start = bench.single_frame()
    else:
        start, _ = train(variant.start, table, seed, bench)
    passes = {"batch": bench.batch, "accumulation": TOGETHER // bench.batch}
    tree = OmegaConf.merge(COMMON, passes, copy.deepcopy(dict(variant.stage)))
    tree.data.train = [str(bench.clips / file) for file in tree.data.train]
    tree.model.path = str(start)
    tree.output = str(bench.folder(name, seed))
    tree.seed = seed
    result = run_stage(build_stage(tree, name))
    return result.judge, result.seconds


def judge_set(folder: Path, reads: str, name: str, count: int, bench: Bench) -> list[Verdict]:
    """Judge the first clips of a held-out set."""
    store = ClipStore([bench.clips / f"{name}.jsonl"], split=None)
    judge = LocalJudge.from_pretrained(folder, device=bench.device)
    found: list[Verdict] = []
    for first in range(0, min(count, len(store)), 32):
        numbers = range(first, min(first + 32, count, len(store)))
        found += _READERS[reads](judge, store, numbers)
    return found


def _two_turns(judge: LocalJudge, store: ClipStore, numbers: Sequence[int]) -> list[Verdict]:
    clips = [store.annotation(number) for number in numbers]
    videos = [store.video(number, clip) for number, clip in zip(numbers, clips, strict=True)]
    reports = CaCScorer(judge, clips_at_once=32).inspect(videos)
    return [
        _verdict(clip, math.nan if report.score is None else report.score, report.findings)
        for clip, report in zip(clips, reports, strict=True)
    ]


def _seen(judge: LocalJudge, store: ClipStore, number: int) -> ClipInView:
    clip = store.annotation(number)
    video = store.video(number, clip)
    view = View(judge.settings, judge.family, judge.patch_factor)
    random = np.random.default_rng(0)
    return ClipInView(clip, video.frames, video.fps, view, LessonOptions(), random)


def _verdict_at_once(judge: LocalJudge, store: ClipStore, numbers: Sequence[int]) -> list[Verdict]:
    seen = [_seen(judge, store, number) for number in numbers]
    log_probs = judge.choice_log_probs(
        [one.scan()[1] for one in seen], choices=VERDICT_CHOICES, prefix=VERDICT_PREFIX
    )
    chances = torch.softmax(log_probs, 1)[:, 0].tolist()
    return [_verdict(one.clip, chance, ()) for one, chance in zip(seen, chances, strict=True)]


def _one_turn(judge: LocalJudge, store: ClipStore, numbers: Sequence[int]) -> list[Verdict]:
    seen = [_seen(judge, store, number) for number in numbers]
    conversations = [open_whole(one)[1] for one in seen]
    texts = judge.generate(conversations, max_new_tokens=256, prefix=FINDINGS_PREFIX)
    lines = [text.strip().partition("\n")[0] for text in texts]
    log_probs = judge.choice_log_probs(
        conversations,
        choices=VERDICT_CHOICES,
        prefix=[f"{line}\n{VERDICT_PREFIX}" for line in lines],
    )
    chances = torch.softmax(log_probs, 1)[:, 0].tolist()
    found = []
    for one, line, chance in zip(seen, lines, chances, strict=True):
        try:
            findings = parse_findings(line, one.seconds)
        except AnswerError:
            findings, chance = (), math.nan
        found.append(_verdict(one.clip, chance, findings))
    return found


def _grounding(
    judge: LocalJudge, store: ClipStore, numbers: Sequence[int], *, reflection: bool = False
) -> list[Verdict]:
    """Answers of one turn; the verdict is what the answer says, without a probability."""
    wording = judge.settings.wording
    task = Task(kind="grounding", thinking=False, reflection=reflection, wording=wording)
    seen = [_seen(judge, store, number) for number in numbers]
    texts = judge.generate([open_task(task, one)[1] for one in seen], max_new_tokens=192)
    found = []
    for one, text in zip(seen, texts, strict=True):
        try:
            answer = parse_task_answer(task, text, one.clip, duration_seconds=one.seconds)
        except AnswerError:
            found.append(_verdict(one.clip, math.nan, ()))
            continue
        windows = [Finding(UNSPECIFIED, window) for window in answer.value]
        found.append(_verdict(one.clip, float(not windows), windows))
    return found


def _heads(judge: LocalJudge, store: ClipStore, numbers: Sequence[int]) -> list[Verdict]:
    classifier = Classifier.from_pretrained(judge.judge_id)
    found = []
    for number in numbers:
        clip = store.annotation(number)
        (report,) = classifier.inspect([store.video(number, clip)])
        found.append(_verdict(clip, report.reward, report.findings))
    return found


_READERS = {
    "two_turns": _two_turns,
    "verdict": _verdict_at_once,
    "one_turn": _one_turn,
    "grounding": _grounding,
    "reflection": partial(_grounding, reflection=True),
    "heads": _heads,
}


def _verdict(clip: Any, p_clean: float, findings: Sequence[Any]) -> Verdict:
    broken = bool(clip.findings)
    located = broken and not math.isnan(p_clean)
    return Verdict(
        broken,
        p_clean,
        temporal_iou(findings, clip.findings) if located else math.nan,
        mean_box_iou(findings, clip.findings) if located else math.nan,
    )


def measure(name: str, table: Mapping[str, Variant], seed: int, count: int, bench: Bench) -> None:
    """Train and judge what is not there yet."""
    variant = table[name]
    judge, seconds = train(name, table, seed, bench)
    for one in variant.sets:
        file = bench.folder(name, seed) / f"{one}.json"
        if file.is_file():
            continue
        began = time.perf_counter()
        verdicts = judge_set(judge, variant.reads, one, count, bench)
        write_verdicts(file, verdicts, seconds, time.perf_counter() - began)
        right = [(v.p_clean < 0.5) == v.anomalous for v in verdicts]
        print(f"{name} seed {seed} {one}: accuracy {np.mean(right):.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=900, help="of each SFT variant (900)")
    parser.add_argument(
        "--frames", type=int, default=1200, help="of the single-frame SFT before it (1,200)"
    )
    parser.add_argument("--grpo", type=int, default=180, help="updates of GRPO (180)")
    parser.add_argument("--clips", type=int, default=512, help="of each held-out set (512)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--device", default="cpu", help="where finished judges are asked (cpu)")
    parser.add_argument(
        "--batch", type=int, default=8, help=f"lessons of a pass, of {TOGETHER} of an update (8)"
    )
    options = parser.parse_args(arguments)
    if options.batch < 1 or TOGETHER % options.batch:
        parser.error(f"--batch must divide {TOGETHER}, got {options.batch}")
    torch.set_num_threads(options.threads)
    bench = Bench(options.scale, options.device, options.batch, options.frames)
    table = variants(options.updates, options.grpo, SCALES[options.scale])
    unknown = set(options.variants or ()) - table.keys()
    if unknown:
        parser.error(f"--variants must be of {', '.join(table)}, got {', '.join(sorted(unknown))}")
    for seed in options.seeds:
        for name in options.variants or table:
            measure(name, table, seed, options.clips, bench)


if __name__ == "__main__":
    main()
