"""The table of importers, by the name of what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from cac_reward.data.importers.base import ImportSettings, Outcome, Problem
from cac_reward.data.importers.deeptrace_reward import read_deeptrace_reward
from cac_reward.data.importers.labelled import read_coco_json, read_cvat_xml
from cac_reward.data.importers.shanghaitech import read_shanghaitech
from cac_reward.data.importers.ucf_crime import read_uca, read_ucf_crime
from cac_reward.data.importers.vau_bench import read_vau_bench
from cac_reward.data.importers.vif_bench import read_vif_bench
from cac_reward.data.importers.vif_cot_4k import read_vif_cot_4k
from cac_reward.data.importers.xd_violence import read_xd_violence


@dataclass(frozen=True)
class Importer:
    """One kind of file."""

    read: Callable[[Path, ImportSettings], Iterator[Outcome]]
    uses: tuple[str, ...]
    """Settings that it looks at; another one that is given is an error."""
    reads: str
    """What the file is, for people."""


IMPORTERS = {
    "vau_bench": Importer(read_vau_bench, ("fps", "videos", "split"), "VAU-Bench's CSV"),
    "vif_cot_4k": Importer(read_vif_cot_4k, ("fps", "videos", "split"), "ViF-CoT-4K's JSON"),
    "vif_bench": Importer(read_vif_bench, ("fps", "videos", "split"), "ViF-Bench's index"),
    "deeptrace_reward": Importer(
        read_deeptrace_reward, ("videos", "split"), "DeepTraceReward's all_data.json"
    ),
    "ucf_crime": Importer(
        read_ucf_crime,
        ("fps", "videos", "split", "sentences"),
        "UCF-Crime's Temporal_Anomaly_Annotation_for_Testing_Videos.txt",
    ),
    "uca": Importer(read_uca, ("fps", "videos", "split"), "UCA's UCFCrime_*.json"),
    "xd_violence": Importer(
        read_xd_violence, ("fps", "videos", "split"), "XD-Violence's annotations.txt"
    ),
    "shanghaitech": Importer(
        read_shanghaitech, ("fps", "videos", "split"), "ShanghaiTech's folder of masks, or one"
    ),
    "cvat": Importer(
        read_cvat_xml,
        ("fps", "videos", "split", "path", "empty_is_clean"),
        "'CVAT for video 1.1' XML",
    ),
    "coco": Importer(
        read_coco_json,
        ("fps", "videos", "split", "empty_is_clean"),
        "COCO's JSON of videos, or of images in folders",
    ),
}


def import_annotations(
    kind: str, paths: Sequence[Path], settings: ImportSettings
) -> Iterator[Outcome]:
    """Every entry of some files: the clip, or the problem that keeps it out.

    Args:
        kind: A key of `IMPORTERS`.
        paths: Of the files, each of this kind.
        settings: What the files do not say.

    Raises:
        FileNotFoundError: If a file is missing; before anything is read.
        ValueError: If the kind is unknown, a setting is given that it does not look at, or a file
            is of another kind as a whole; the message begins with its name.
    """
    if kind not in IMPORTERS:
        raise ValueError(f"format must be one of {', '.join(IMPORTERS)}, got {kind!r}")
    for one in fields(ImportSettings):
        if getattr(settings, one.name) != one.default and one.name not in IMPORTERS[kind].uses:
            raise ValueError(f"{one.name} must be left out for {kind}, got one; it is not used")
    if settings.path is not None and len(paths) > 1:
        raise ValueError(
            f"path must be left out for several files, got {settings.path!r} for {len(paths)}; "
            "import them one by one"
        )
    for path in (*paths, *settings.sentences):
        if not path.exists():
            raise FileNotFoundError(f"file must exist to be imported, got {path}")
    return _outcomes(kind, paths, settings)


def _outcomes(kind: str, paths: Sequence[Path], settings: ImportSettings) -> Iterator[Outcome]:
    for path in paths:
        found = False
        try:
            for outcome in IMPORTERS[kind].read(path, settings):
                found = True
                yield outcome
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not found:
            yield Problem(str(path), None, None, "file must hold at least one entry, got none")
