"""The contact sheet: every fault beside its clean counterpart and the edit that is no fault, to be
looked at by eye.

One HTML file that fetches nothing from the network and runs no script.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.synthesis.faults import FAULTS
from cac_reward.data.synthesis.making import CLEAN, FAULTY, HARMLESS
from cac_reward.data.synthesis.motion import import_cv2
from cac_reward.drawing import draw_findings, fit_for_display, video_uri
from cac_reward.video import Video
from cac_reward.whole_files import whole_file

_STYLE = """
body { margin: 0; padding: 24px; font: 15px/1.5 system-ui, sans-serif; background: #f6f7f9;
  color: #1b2129; }
h2 { margin: 28px 0 4px; } section { background: #fff; border: 1px solid #dde2e9;
  border-radius: 10px; padding: 12px 16px; margin: 12px 0; }
p { margin: 0 0 8px; color: #5c6675; overflow-wrap: anywhere; } b { color: #1b2129; }
.row { display: flex; gap: 6px; align-items: flex-start; margin: 4px 0; }
figure { margin: 0; flex: 1 1 0; min-width: 0; } img, video { width: 100%; display: block; }
figcaption { font-size: .78rem; color: #5c6675; }
"""
_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def write_sheet(
    path: Path, clips: Sequence[AnnotatedClip], root: Path, *, examples: int = 6
) -> None:
    """Write the sheet for synthesized clips.

    Args:
        path: Of the HTML file; its folder must exist.
        clips: What `synthesize` made.
        root: Folder that the clips' paths are below.
        examples: Most takes to show of each fault.

    Raises:
        FileNotFoundError: If the folder or a clip is missing.
        ValueError: If `examples` is below 1, or there are no clips.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {path} must exist; make it first")
    if not clips:
        raise ValueError("clips must be at least one to show, got none")
    takes: dict[str, dict[str, AnnotatedClip]] = defaultdict(dict)
    for clip in clips:
        takes[clip.extra["take"]][str(clip.category)] = clip
    with whole_file(path) as opened:
        opened.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>Planted faults</title><style>{_STYLE}</style></head><body>\n"
            f"<h1>Planted faults</h1><p>{len(takes)} takes. Each row of stills: the clean "
            "counterpart in the middle of the fault, the fault from its first to its last frame, "
            "and its boxes. Below: the clips with boxes, clean, and with an edit that is no "
            "fault.</p>\n"
        )
        for name in FAULTS:
            shown = [one for one in takes.values() if one[FAULTY].extra["edit"] == name]
            if shown:
                opened.write(f"<h2>{escape(name)} ({FAULTS[name].type}): {len(shown)}</h2>\n")
            for take in shown[:examples]:
                opened.writelines(_section(take, root))
        opened.write("</body></html>\n")


def _section(take: dict[str, AnnotatedClip], root: Path) -> Iterator[str]:
    """One take."""
    faulty = take[FAULTY]
    video, clean = (Video.decode(root / take[kind].path) for kind in (FAULTY, CLEAN))
    (finding,) = faulty.findings
    frames = finding.window.frame_indices(video.num_frames, video.fps)
    window = f"{finding.window.start_seconds:.2f} to {finding.window.end_seconds:.2f} s"
    yield (
        f'<section id="{escape(faulty.extra["take"])}"><p><b>{escape(finding.why)}</b>; {window}, '
        f"severity {finding.severity}, {escape(faulty.path)}, crf {escape(faulty.extra['crf'])}; "
        f"the edit without fault is {escape(take[HARMLESS].extra['edit'])}</p>\n"
    )
    middle = frames[len(frames) // 2]
    drawn = draw_findings(video.frames, [finding], video.fps)
    stills = [(clean.frames[middle], "clean", middle)]
    for share in (0.0, 0.33, 0.5, 1.0):
        index = frames[round(share * (len(frames) - 1))]
        stills.append((video.frames[index], "fault", index))
    stills.append((drawn[middle], "boxes", middle))
    yield '<div class="row">'
    for picture, what, index in stills:
        yield (
            f'<figure><img alt="{what}" src="{_jpeg(picture)}"><figcaption>{what}, frame {index}'
            "</figcaption></figure>"
        )
    yield '</div>\n<div class="row">'
    harmless = Video.decode(root / take[HARMLESS].path)
    for what, one in (
        ("fault with boxes", Video(drawn, video.fps)),
        ("clean", clean),
        ("edit without fault", harmless),
    ):
        uri = video_uri(fit_for_display(one))
        yield (
            f'<figure><video src="{uri}" controls loop muted></video>'
            f"<figcaption>{what}</figcaption></figure>"
        )
    yield "</div></section>\n"


def _jpeg(frame: Tensor) -> str:
    """[3 H W] as a data URI."""
    cv2 = import_cv2()
    picture = fit_for_display(Video(torch.stack([frame, frame]), 1.0)).frames[0]
    pixels = picture.permute(1, 2, 0).contiguous().numpy()[..., ::-1]
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
