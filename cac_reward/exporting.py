"""From any format of findings to any other, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cac_reward.exports.activitynet import read_activitynet, write_activitynet
from cac_reward.exports.base import LabelledClip
from cac_reward.exports.coco import read_coco, write_coco
from cac_reward.exports.cvat import read_cvat, write_cvat
from cac_reward.exports.fiftyone import read_fiftyone, write_fiftyone
from cac_reward.exports.label_studio import read_label_studio, write_label_studio
from cac_reward.page import write_page
from cac_reward.records import ClipRecord
from cac_reward.tables import write_overlays, write_table
from cac_reward.whole_files import whole_file

FORMATS: dict[
    str,
    tuple[Callable[[Sequence[LabelledClip]], str], Callable[[str], list[LabelledClip]]],
] = {
    "coco": (write_coco, read_coco),
    "fiftyone": (write_fiftyone, read_fiftyone),
    "label_studio": (write_label_studio, read_label_studio),
    "activitynet": (write_activitynet, read_activitynet),
}
"""Formats that hold many clips in one text."""

VIEWS = ("html", "csv", "overlays")
SOURCES = ("reports", "cvat", *FORMATS)
TARGETS = (*VIEWS, "findings", "cvat", *FORMATS)


def export_records(
    records: Sequence[ClipRecord], target: str, output: Path, videos: str = "embed"
) -> None:
    """Write judged clips as a view or in a format.

    Args:
        records: Those that could not be read are in html and csv only.
        target: One of `TARGETS`.
        output: File, or folder for 'overlays' and 'cvat'.
        videos: Of the page, see `write_page`.

    Raises:
        FileNotFoundError: If a clip is gone that must be shown.
        ValueError: If a name is unknown, or a clip is not the one that was judged.
    """
    if target == "html":
        write_page(output, records, videos=videos)
    elif target == "csv":
        write_table(output, records)
    elif target == "overlays":
        write_overlays(output, records)
    else:
        readable = [one for one in records if one.report is not None]
        export_clips([LabelledClip.from_record(one) for one in readable], target, output)


def export_clips(clips: Sequence[LabelledClip], target: str, output: Path) -> None:
    """Write clips with findings in a format; a half-written file never carries the final name.

    'findings' is a line of JSON for each clip. 'cvat' makes the folder and a file for each clip in
    it, named by its number and its own name.

    Raises:
        ValueError: If the format is unknown, or shows what only a judge's report has.
    """
    if target in VIEWS:
        raise ValueError(f"to must be a format of findings for --from a format, got {target!r}")
    if target == "cvat":
        output.mkdir(exist_ok=True)
        for number, clip in enumerate(clips):
            _write(output / f"{number:05}_{Path(clip.path).name}.xml", write_cvat(clip))
    elif target == "findings":
        _write(output, "".join(_line(clip) + "\n" for clip in clips))
    elif target in FORMATS:
        _write(output, FORMATS[target][0](clips))
    else:
        raise ValueError(f"to must be one of {TARGETS}, got {target!r}")


def read_clips(
    paths: Sequence[Path], source: str, path: str | None = None, fps: float | None = None
) -> list[LabelledClip]:
    """Read clips with findings from files of a format.

    Args:
        paths: Of the files.
        source: 'cvat' or one of `FORMATS`.
        path: Of the video of a file that CVAT has written.
        fps: Its frames per second.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is of another form, with its name in front, or several have one path.
    """
    if path is not None and len(paths) > 1:
        raise ValueError(
            f"path must be left out for several files, got {path!r} for {len(paths)}; export them "
            "one by one"
        )
    clips: list[LabelledClip] = []
    for one in paths:
        try:
            text = one.read_text(encoding="utf-8")
            if source == "cvat":
                clips.append(read_cvat(text, path=path, fps=fps))
            else:
                clips += FORMATS[source][1](text)
        except ValueError as error:
            raise ValueError(f"{one}: {error}") from error
    return clips


def _line(clip: LabelledClip) -> str:
    plain = {**vars(clip), "findings": [finding.to_json() for finding in clip.findings]}
    return json.dumps(plain, allow_nan=False)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as opened:
        opened.write(text)
