"""How a file asks its frames to be shown: which way up, and when.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

import logging
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The display matrix of a decoded frame: (a, b, c, d) of x' = a x + c y, y' = b x + d y.

    Args:
        frame: PyAV's; None is returned where it is to be shown as it is.
    """
    data = next((one for one in frame.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return None
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    return a, b, c, d


def upright(picture: Tensor, matrix: tuple[int, ...] | None, name: str) -> Tensor:
    """Turn and mirror a picture as its file asks; what that says of size and aspect is left out.

    Args:
        picture: [C H W].
        matrix: What `display_matrix` gave.
        name: Of the file, for the message.

    Returns:
        [C H W] or [C W H].

    Raises:
        ValueError: If it is not to be turned by whole quarters.
    """
    if matrix is None:
        return picture
    small = max(map(abs, matrix)) / 100
    a, b, c, d = ((one > small) - (one < -small) for one in matrix)
    if b == c == 0 != a * d:
        return picture.flip([axis for axis, sign in ((1, d), (2, a)) if sign < 0])
    if a == d == 0 != b * c:
        return picture.mT.flip([axis for axis, sign in ((1, b), (2, c)) if sign < 0])
    raise ValueError(
        f"video must be turned by whole quarters, got the display matrix {matrix} in {name}; "
        "write it again upright"
    )


def fit_size(height: int, width: int, longest_side: int | None) -> dict[str, Any]:
    """PyAV's arguments that shrink a frame to a longest side in one pass; none for small frames.

    Example:
        >>> fit_size(752, 1360, 480)["height"], fit_size(240, 320, 480)
        (265, {})
    """
    if longest_side is None or max(height, width) <= longest_side:
        return {}
    scale = longest_side / max(height, width)
    # Every pixel of the large frame counts.
    size = {"height": max(2, round(height * scale)), "width": max(2, round(width * scale))}
    return {**size, "interpolation": "AREA"}


def even_order(
    times: Sequence[float | None], fps: float, name: str, check_count: Callable[[int], None]
) -> Sequence[int]:
    """Which decoded frame is on screen at 0, 1 / fps, 2 / fps, ...

    A frame counts if it is there in the middle of the step. A warning says where steps are uneven.

    Args:
        times: Seconds at which each decoded frame is first shown.
        fps: Frames per second to show.
        name: Of the file, for the warning.
        check_count: Called with the number of frames to show before they are listed: two frames
            that are hours apart are few until they are spaced evenly.

    Returns:
        Indices of decoded frames, one for each frame to show.
    """
    shown = [time - times[0] for time in times if time is not None and times[0] is not None]
    if len(shown) < len(times) or shown != sorted(shown) or shown[-1] == 0:
        logger.warning("%s: no usable time stamps; taking frames as evenly spaced", name)
        return range(len(times))
    off = max(abs(time - index / fps) for index, time in enumerate(shown))
    if off <= 0.75 / fps:
        return range(len(times))
    logger.warning(
        "%s: frames are not evenly spaced (up to %.2f s off); showing it at %.2f fps",
        name,
        off,
        fps,
    )
    count = round(shown[-1] * fps) + 1
    check_count(count)
    return [bisect_right(shown, (index + 0.5) / fps) - 1 for index in range(count)]
