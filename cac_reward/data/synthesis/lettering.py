"""Text in a clip, and faults of it: a sign is written into the clean clip, then its letters are
scrambled for a while."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cac_reward.data.synthesis.blending import Canvas
from cac_reward.data.synthesis.motion import Floats, Pixels, import_cv2
from cac_reward.data.synthesis.targets import Rect

WORDS = (
    *("OPEN", "EXIT", "CAFE", "HOTEL", "MARKET", "STATION", "BAKERY", "CINEMA", "LIBRARY"),
    *("Platform 4", "Fresh Bread", "No Entry", "City Tour", "Room 27", "Main Street", "Welcome"),
    *("Chapter One", "The next day", "Two hours later", "Last train home", "See you soon"),
    *("Good morning", "Mind the step", "Flight 308", "Summer Sale", "Please wait here"),
)
"""What is written into clips."""

_GLYPHS = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghknpqrstuyz2345679"
_LEAST_HEIGHT = 10
"""Pixels; smaller letters cannot be read in the first place."""


@dataclass(frozen=True, eq=False)
class Sign:
    """A line of text in every frame of a clip, at one place."""

    text: str
    rect: Rect
    """Where it is, with its plate."""
    clean: Pixels
    """[F H W 3] without it."""
    font_pixels: int
    dark: bool
    """Dark letters on a light plate, or the other way round."""
    plate: float
    """How opaque the plate is, 0 to 1."""

    def draw(self, frame: int, letters: Floats) -> Floats:
        """[H W 3] of the sign's place with these letters [H W]."""
        below = self.clean[frame][self.rect.slices].astype(np.float32)
        ground, ink = (235.0, 20.0) if self.dark else (18.0, 240.0)
        plate = below + self.plate * (ground - below)
        return np.asarray(plate + letters[..., None] * (ink - plate), dtype=np.float32)

    def letters(self) -> Floats:
        """[H W] as they should be."""
        return self._set([(letter, 0, 0.0, False) for letter in self.text])

    def scrambled(self, first: int, last: int, random: np.random.Generator) -> Floats:
        """[H W] with the letters from `first` to before `last` replaced, turned and bent."""
        glyphs: list[tuple[str, int, float, bool]] = [(one, 0, 0.0, False) for one in self.text]
        for index in range(first, last):
            letter = self.text[index]
            if random.random() < 0.6 or letter == " ":
                letter = str(random.choice(list(_GLYPHS)))
            shift = round(float(random.uniform(-0.18, 0.18)) * self.font_pixels)
            tilt = float(random.uniform(-25, 25))
            glyphs[index] = (letter, shift, tilt, bool(random.random() < 0.4))
        return self._bent(self._set(glyphs), first, last, random)

    def places(self) -> list[tuple[int, int]]:
        """Left and right edge of each letter in the sign."""
        font = _font(self.font_pixels)
        pad = self.font_pixels // 3
        edges = [pad + round(font.getlength(self.text[:k])) for k in range(len(self.text) + 1)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def _set(self, glyphs: list[tuple[str, int, float, bool]]) -> Floats:
        font = _font(self.font_pixels)
        line = Image.new("L", (self.rect.width, self.rect.height))
        for (left, right), (letter, shift, tilt, mirrored) in zip(
            self.places(), glyphs, strict=True
        ):
            size = 2 * self.font_pixels
            cell = Image.new("L", (size, self.rect.height))
            middle = (size // 2, self.rect.height // 2)
            ImageDraw.Draw(cell).text(middle, letter, fill=255, font=font, anchor="mm")
            if mirrored:
                cell = cell.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if tilt:
                cell = cell.rotate(tilt, Image.Resampling.BILINEAR, center=middle)
            corner = ((left + right) // 2 - size // 2, shift)
            whole = Image.new("L", line.size)
            whole.paste(cell, corner)
            line = Image.fromarray(np.maximum(np.asarray(line), np.asarray(whole)))
        return np.asarray(line).astype(np.float32) / np.float32(255)

    def _bent(self, letters: Floats, first: int, last: int, random: np.random.Generator) -> Floats:
        """The letters of a stretch in waves."""
        cv2 = import_cv2()
        places = self.places()
        rows, columns = np.mgrid[: self.rect.height, : self.rect.width].astype(np.float32)
        reach = ((columns >= places[first][0]) & (columns < places[last - 1][1])).astype(np.float32)
        reach = cv2.GaussianBlur(reach, (0, 0), 1.5)
        wave, phase = float(random.uniform(1.5, 3.0)), float(random.uniform(0, 2 * np.pi))
        high = 0.12 * self.font_pixels * reach
        turn = 2 * np.pi * wave / (2 * self.font_pixels)
        return cv2.remap(
            letters,
            columns + high * np.sin(turn * rows + phase),
            rows + high * np.sin(turn * columns + phase),
            cv2.INTER_LINEAR,
        )


def write_sign(frames: Pixels, random: np.random.Generator) -> tuple[Pixels, Sign] | None:
    """Write a line of text into every frame, as a sign or a caption that stays where it is.

    Args:
        frames: [F H W 3].
        random: Chooses words, size, place and colours.

    Returns:
        The frames with it, and the sign; None where the frames are too small to read it.
    """
    height, width = frames.shape[1:3]
    font_pixels = max(_LEAST_HEIGHT, round(float(random.uniform(0.07, 0.12)) * height))
    pad = 2 * (font_pixels // 3)
    lengths = {text: pad + round(_font(font_pixels).getlength(text)) for text in WORDS}
    fitting = [text for text in WORDS if lengths[text] <= 0.9 * width]
    if not fitting or 2 * font_pixels > height:
        return None
    text = str(random.choice(fitting))
    span = lengths[text]
    line = round(1.6 * font_pixels)
    left = int(random.integers(0, width - span + 1))
    if random.random() < 0.5:
        left = (width - span) // 2
    top = int(random.integers(round(0.05 * height), max(1, height - line)))
    rect = Rect(left, top, left + span, min(height, top + line))
    plate = float(random.choice([0.35, 0.7, 1.0]))
    sign = Sign(text, rect, frames, font_pixels, bool(random.random() < 0.5), plate)
    letters = sign.letters()
    written = frames.copy()
    for frame in range(len(frames)):
        drawn = np.rint(sign.draw(frame, letters)).clip(0, 255)
        written[frame][rect.slices] = drawn.astype(np.uint8)
    return written, sign


def scramble(
    canvas: Canvas, sign: Sign, start: int, stop: int, random: np.random.Generator
) -> None:
    """Scramble a stretch of the letters, another way every few frames."""
    letters = len(sign.text)
    span = int(random.integers(min(3, letters), letters + 1))
    first = int(random.integers(0, letters - span + 1))
    held = 0
    for frame in range(start, stop):
        if held == 0:
            changed, held = sign.scrambled(first, first + span, random), int(random.integers(2, 5))
        held -= 1
        everywhere = np.ones(changed.shape, np.float32)
        canvas.blend(frame, sign.rect, sign.draw(frame, changed), everywhere)


def _font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError(
            "text needs Pillow with FreeType; install it with: pip install --upgrade pillow"
        )
    return font
