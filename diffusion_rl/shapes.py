"""Named axes checked at the door of every function that takes tensors."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor, axes: str, **known: int) -> dict[str, int]:
    """Hold a tensor's shape against named axes, and return the size of each.

    Args:
        name: What the caller calls the tensor; it opens the error.
        tensor: Anything with a shape.
        axes: Axis letters separated by blanks, e.g. "B F C H W"; a closing "..." takes any rest.
        known: Sizes that some of the letters must have.

    Returns:
        The size of every letter in `axes`.

    Raises:
        ValueError: The number of axes or the size of a known one differs.

    Example:
        >>> import torch
        >>> check_shape("scores", torch.zeros(3), "B")
        {'B': 3}
    """
    letters = axes.split()
    open_ended = letters[-1] == "..."
    letters = letters[:-1] if open_ended else letters
    shape = tuple(tensor.shape)
    if len(shape) < len(letters) or (len(shape) > len(letters) and not open_ended):
        raise ValueError(
            f"{name} has shape {shape}, but axes '{axes}' need {len(letters)} axes, "
            f"not {len(shape)}"
        )
    sizes = dict(zip(letters, shape, strict=False))
    for letter, size in sizes.items():
        if size != known.get(letter, size):
            raise ValueError(
                f"{name} has shape {shape}, but axes '{axes}' need "
                f"{letter}={known[letter]}, not {size}"
            )
    return sizes


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Hold a tensor against another whose shape it must have.

    Raises:
        ValueError: It has another; the message names both.
    """
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name} {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
