"""What arrays of pixels must be: a layout that is stated, floats in [0, 1], and no NaN.

Axes: K frames, H height, W width.
"""

from __future__ import annotations

from torch import Tensor


def check_frames(name: str, frames: Tensor) -> None:
    """Refuse what is not [K 3 H W] float in [0, 1].

    Raises:
        ValueError: Naming what is wrong and how to put it right.
    """
    if not isinstance(frames, Tensor) or frames.ndim != 4 or frames.shape[1] != 3:
        shape = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"{name} must be a tensor [frames, 3, height, width], got {shape}")
    if 0 in frames.shape:
        raise ValueError(f"{name} must hold at least one pixel, got shape {tuple(frames.shape)}")
    if not frames.is_floating_point():
        raise ValueError(f"{name} must be float in [0, 1], got {frames.dtype}; divide by 255")
    low, high = frames.min().item(), frames.max().item()
    check_no_nan(name, frames, "frames", low)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name} must be in [0, 1], got min={low:.2f}, max={high:.2f}; "
            "rescale with (x + 1) / 2 if it is in [-1, 1]"
        )


def check_no_nan(name: str, values: Tensor, parts: str, low: float) -> None:
    """Refuse NaN, with how many there are and where.

    Args:
        name: of the argument.
        values: of any shape.
        parts: what the first axis counts, such as 'frames'.
        low: the minimum of `values`, which is NaN where one of them is.

    Raises:
        ValueError: If there is one.
    """
    if low == low:
        return
    broken = values.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist()
    raise ValueError(
        f"{name} must hold no NaN, got {int(values.isnan().sum())} NaN values in {len(broken)} of "
        f"{len(values)} {parts}, first {broken[:10]}; the generator or its decoder overflowed (try "
        "float32 or bfloat16)"
    )
