"""A procedural world of moving shapes in which faults can be planted and are known exactly.

Clips show one to three coloured shapes that move and bounce over a grey background and never
touch. A prompt states colours, shapes and motion, and never mentions faults. Every clip is a pure
function of its seed. Legend: F frames, O objects, H height, W width.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from examples.toy_world.painting import background, distance, turn_hue

COLOURS = {
    "red": (235, 50, 50),
    "green": (50, 215, 60),
    "blue": (60, 80, 245),
    "yellow": (235, 220, 45),
    "magenta": (225, 55, 225),
    "cyan": (45, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("sideways", "up and down", "diagonally")
FAULTS = ("vanish", "teleport", "recolour", "deform", "duplicate", "freeze", "flicker")
SPLITS = ("train", "evaluation")

SHARES = (0.45, 0.5, 0.05)
"""How often a clip shows one, two and three objects."""

# Longest reach of each shape from its centre, in units of its radius.
_REACH = {"circle": 1.0, "square": 1.25, "triangle": 1.2, "cross": 1.1}


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What every clip of a world has in common."""

    size: int = 32
    """Height and width in pixels, at least 16."""
    num_frames: int = 13
    """Frames per clip, at least 9."""
    fps: float = 8.0
    """Frames per second."""
    fault_rate: float = 0.5
    """Share of clips that carry planted faults, in [0, 1]."""
    object_scale: float = 1.0
    """Size of the objects against the usual, in (0, 1.1]."""
    speed_scale: float = 1.0
    """Speed of the objects against the usual, above 0."""
    fault_frames: int | None = None
    """How many frames every fault lasts, at least 1; None for the usual lengths. A teleport takes
    two and a freeze at least two, whatever this says."""
    hue_shift: float = 0.0
    """Turns every colour by so many degrees; prompts keep calling them by their usual names."""

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"size must be at least 16, got {self.size}")
        if self.num_frames < 9:
            raise ValueError(f"num_frames must be at least 9, got {self.num_frames}")
        if not 0 <= self.fault_rate <= 1:
            raise ValueError(f"fault_rate must be in [0, 1], got {self.fault_rate}")
        if not 0 < self.object_scale <= 1.1:
            raise ValueError(f"object_scale must be in (0, 1.1], got {self.object_scale}")
        if not self.speed_scale > 0:
            raise ValueError(f"speed_scale must be above 0, got {self.speed_scale}")
        if self.fault_frames is not None and self.fault_frames < 1:
            raise ValueError(f"fault_frames must be at least 1, got {self.fault_frames}")


@dataclass(frozen=True)
class PlantedFault:
    """One fault with the truth about it."""

    type: str
    first_frame: int
    last_frame: int
    window: tuple[float, float]
    """Seconds, [start, end]; the end is the end of the last faulty frame."""
    boxes: tuple[tuple[float, tuple[float, float, float, float]], ...]
    """(time in seconds, (x1, y1, x2, y2) relative to the frame), one per faulty frame."""
    severity: int
    target: str
    """The object concerned, such as 'red circle'."""


@dataclass
class Track:
    """One object, or the second copy of a duplicated one, over time."""

    colour: str
    shape: str
    motion: str
    radius: float
    """Relative to the frame."""
    start: np.ndarray
    """[2] x, y of the centre in frame 0, relative to the frame."""
    velocity: np.ndarray
    """[2] relative to the frame, per frame."""
    centre: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """[F 2] as drawn."""
    rgb: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    """[F 3] in 0..255, as drawn."""
    alpha: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[F] opacity in [0, 1]."""
    stretch: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """[F 2] factors on the radius along x and y."""

    @property
    def name(self) -> str:
        """Such as 'red circle'."""
        return f"{self.colour} {self.shape}"

    def box(self, frame: int) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) relative to the frame, cut at its edges."""
        reach = self.radius * min(_REACH[self.shape], 1.1) * self.stretch[frame]
        low = np.clip(self.centre[frame] - reach, 0, 1)
        high = np.clip(self.centre[frame] + reach, 0, 1)
        return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


@dataclass(frozen=True)
class Clip:
    """A rendered clip and everything that is true of it."""

    frames: np.ndarray
    """[F H W 3] uint8."""
    fps: float
    prompt: str
    faults: tuple[PlantedFault, ...]
    tracks: tuple[Track, ...]
    """As drawn, duplicates included."""
    seed: int


def split_of(prompt: str) -> str:
    """Tell which split a prompt belongs to; one in eight is kept for evaluation, by its hash."""
    return "evaluation" if zlib.crc32(prompt.encode()) % 8 == 0 else "train"


def write_prompt(objects: list[tuple[str, str, str]]) -> str:
    """State (colour, shape, motion) of every object.

    Example:
        >>> write_prompt([("red", "circle", "sideways")])
        'a red circle moving sideways'
    """
    return " and ".join(f"a {colour} {shape} moving {motion}" for colour, shape, motion in objects)


def sample_prompts(count: int, seed: int, split: str) -> list[str]:
    """Draw `count` distinct prompts of one split, as many with three objects as the world has.

    There are few prompts with one object; where they run out, two objects take their place.

    Raises:
        ValueError: If `split` is unknown.
    """
    _check_split(split)
    random = np.random.default_rng([seed, 77])
    prompts: dict[str, None] = {}
    places = (random.permutation(count) + random.random()) / count
    for objects in np.searchsorted(np.cumsum(SHARES[:2]), places) + 1:
        tries = 0
        while True:
            tries += 1
            prompt = write_prompt(_sample_objects(random, 2 if tries > 1000 else int(objects)))
            if split_of(prompt) == split and prompt not in prompts:
                break
        prompts[prompt] = None
    return list(prompts)


def render_clip(
    seed: int,
    settings: WorldSettings = WorldSettings(),
    *,
    split: str = "train",
    fault: str | None = None,
) -> Clip:
    """Render the clip that belongs to a seed.

    Args:
        seed: Non-negative; the same seed gives the same clip for the same settings.
        settings: Size, length, rate and share of faulty clips.
        split: Which prompts may be drawn, 'train' or 'evaluation'.
        fault: A fault type to plant alone, 'none' for a clean clip, or None to draw by fault_rate.

    Raises:
        ValueError: If `split` or `fault` is unknown.
    """
    _check_split(split)
    if fault not in (None, "none", *FAULTS):
        raise ValueError(f"fault must be one of {('none', *FAULTS)} or None, got {fault!r}")
    random = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        tracks = _sample_tracks(random, settings, split)
        if fault == "none" or (fault is None and random.random() >= settings.fault_rate):
            wanted: list[str] = []
        elif fault is not None:
            wanted = [fault]
        else:
            wanted = [str(random.choice(FAULTS)) for _ in range(1 + int(random.random() < 0.25))]
        planted = _plant(random, settings, tracks, wanted)
        if planted is not None:
            break
    objects = [(t.colour, t.shape, t.motion) for t in planted[2]]
    frames = _draw(planted[0], background(random, settings.size), settings)
    truth = (tuple(planted[1]), tuple(planted[0]))
    return Clip(frames, settings.fps, write_prompt(objects), *truth, seed)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def _sample_objects(
    random: np.random.Generator, count: int | None = None
) -> list[tuple[str, str, str]]:
    if count is None:
        count = int(random.choice(3, p=SHARES)) + 1
    colours = random.permutation(list(COLOURS))[:count]
    return [(str(c), str(random.choice(SHAPES)), str(random.choice(MOTIONS))) for c in colours]


def _fold(position: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Reflect an unbounded straight path between two walls."""
    span = high - low
    offset = np.mod(position - low, 2 * span)
    return low + np.where(offset > span, 2 * span - offset, offset)


def _path(track: Track, times: np.ndarray) -> np.ndarray:
    """[F 2] centres, relative to the frame, of a bouncing object at given frame times."""
    wall = track.radius * _REACH[track.shape] + 0.01
    line = track.start[None] + times[:, None] * track.velocity[None]
    return _fold(line, np.full(2, wall), np.full(2, 1 - wall))


def _sample_tracks(random: np.random.Generator, settings: WorldSettings, split: str) -> list[Track]:
    """Draw objects of one split whose paths stay apart."""
    times = np.arange(settings.num_frames, dtype=float)
    while True:
        objects = _sample_objects(random)
        if split_of(write_prompt(objects)) != split:
            continue
        for _ in range(12):
            tracks = [_sample_track(random, settings, thing, len(objects)) for thing in objects]
            for track in tracks:
                track.centre = _path(track, times)
            if _apart(tracks):
                for track in tracks:
                    _reset_look(track, settings.num_frames)
                return tracks


def _sample_track(
    random: np.random.Generator, settings: WorldSettings, thing: tuple[str, str, str], count: int
) -> Track:
    colour, shape, motion = thing
    radius = random.uniform(0.15, 0.19) if count < 3 else random.uniform(0.14, 0.155)
    radius *= settings.object_scale
    wall = radius * _REACH[shape] + 0.01
    speed = random.uniform(0.045, 0.075) * settings.speed_scale
    angle = {"sideways": 0.0, "up and down": np.pi / 2, "diagonally": np.pi / 4}[motion]
    signs = random.choice([-1.0, 1.0], size=2)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)]) * signs
    return Track(colour, shape, motion, radius, random.uniform(wall, 1 - wall, 2), velocity)


def _reset_look(track: Track, num_frames: int) -> None:
    track.rgb = np.tile(np.array(COLOURS[track.colour], float), (num_frames, 1))
    track.alpha = np.ones(num_frames)
    track.stretch = np.ones((num_frames, 2))


def _apart(tracks: list[Track]) -> bool:
    """Whether no two objects touch in any frame."""
    for i, one in enumerate(tracks):
        for other in tracks[:i]:
            gap = one.radius * _REACH[one.shape] + other.radius * _REACH[other.shape] + 0.02
            if (np.linalg.norm(one.centre - other.centre, axis=1) < gap).any():
                return False
    return True


def _plant(
    random: np.random.Generator, settings: WorldSettings, tracks: list[Track], wanted: list[str]
) -> tuple[list[Track], list[PlantedFault], list[Track]] | None:
    """Plant each wanted fault on an object of its own; None where there is no room."""
    if len(wanted) > len(tracks):
        wanted = wanted[: len(tracks)]
    targets = random.permutation(len(tracks))[: len(wanted)]
    drawn, faults = list(tracks), []
    for kind, target in zip(wanted, targets):
        for _ in range(20):
            attempt = _plant_one(random, settings, drawn, int(target), kind)
            if attempt is not None:
                break
        else:
            return None
        drawn, fault = attempt
        faults.append(fault)
    return drawn, faults, tracks


def _plant_one(
    random: np.random.Generator,
    settings: WorldSettings,
    tracks: list[Track],
    target: int,
    kind: str,
) -> tuple[list[Track], PlantedFault] | None:
    """One attempt at one fault: new tracks and the truth, or None where something touches."""
    frames, severity = settings.num_frames, int(random.integers(1, 4))
    old = tracks[target]
    track = replace(old, rgb=old.rgb.copy(), alpha=old.alpha.copy(), stretch=old.stretch.copy())
    first = int(random.integers(2, frames - 5))
    last = min(frames - 1, first + 2 + severity + int(random.integers(0, 3)))
    if settings.fault_frames is not None:
        last = min(frames - 1, first + settings.fault_frames - 1)
    if kind == "teleport":
        last = min(frames - 1, first + 1)
        first -= 1
    span = slice(first, last + 1)
    new = [*tracks]
    new[target] = track
    boxed = track
    if kind == "vanish":
        track.alpha[span] = 0
    elif kind == "flicker":
        track.alpha[first : last + 1 : 2] = {1: 0.3, 2: 0.15, 3: 0.0}[severity]
    elif kind == "recolour":
        free = [c for c in COLOURS if c not in {t.colour for t in tracks}]
        track.rgb[span] = COLOURS[str(random.choice(free))]
    elif kind == "deform":
        amount = {1: 1.55, 2: 1.75, 3: 1.95}[severity]
        axis = int(random.integers(2))
        track.stretch[span, axis] = amount
        track.stretch[span, 1 - axis] = 0.9 / amount
    elif kind == "freeze":
        times = np.arange(frames, dtype=float)
        last = min(frames - 1, last + 1)
        times = np.where(times > first, np.maximum(first, times - (last - first)), times)
        track.centre = _path(track, times)
    elif kind == "teleport":
        if not _move_away(random, track, first + 1, frames):
            return None
    elif kind == "duplicate":
        boxed = replace(track, centre=track.centre.copy(), alpha=np.zeros(frames))
        boxed.alpha[span] = 1
        boxed.start = random.uniform(0.2, 0.8, 2)
        boxed.centre = _path(boxed, np.arange(frames, dtype=float))
        new.append(boxed)
    if kind in ("freeze", "teleport", "duplicate") and not _apart(new):
        return None
    boxes = tuple((f / settings.fps, boxed.box(f)) for f in range(first, last + 1))
    window = (first / settings.fps, (last + 1) / settings.fps)
    return new, PlantedFault(kind, first, last, window, boxes, severity, old.name)


def _move_away(random: np.random.Generator, track: Track, frame: int, frames: int) -> bool:
    """Continue a track from another place from `frame` on; False where the jump is too small."""
    before = track.centre
    moved = replace(track, start=random.uniform(0.15, 0.85, 2))
    after = _path(moved, np.arange(frames, dtype=float) - frame)
    track.centre = np.where(np.arange(frames)[:, None] < frame, before, after)
    return bool(np.linalg.norm(after[frame] - before[frame]) > 0.32)


def _draw(tracks: list[Track], background: np.ndarray, settings: WorldSettings) -> np.ndarray:
    """Paint all tracks over the background, anti-aliased. [F H W 3] uint8."""
    size = settings.size
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    image = np.repeat(background[None].astype(np.float32), settings.num_frames, axis=0)
    for track in tracks:
        radius = (track.radius * track.stretch).astype(np.float32)
        centre = track.centre.astype(np.float32)
        x = ((axis[None, :] - centre[:, :1]) / radius[:, :1])[:, None, :]
        y = ((axis[None, :] - centre[:, 1:]) / radius[:, 1:])[:, :, None]
        far = distance(track.shape, x, y)
        sharp = np.float32(track.radius * size)
        cover = np.clip(0.5 - far * sharp, 0, 1)
        cover = cover * track.alpha.astype(np.float32)[:, None, None]
        rgb = turn_hue(track.rgb, settings.hue_shift).astype(np.float32)[:, None, None, :]
        image += cover[..., None] * (rgb - image)
    return np.round(image).astype(np.uint8)
