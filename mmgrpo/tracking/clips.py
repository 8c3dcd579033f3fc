"""Videos as pictures: a contact sheet to print, and an animation to play."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from mmgrpo.tracking.pictures import MAX_CELL, PAPER

SHEET_FRAMES = 9
ANIMATED_FRAMES = 24
FRAME_MS = 125
"""Display time of a frame; a GIF counts in hundredths of a second."""


def contact_sheet(video: Sequence[Image.Image]) -> Image.Image:
    """Draw a video's frames in reading order, at most nine, evenly chosen.

    They stand in one row where that fits a cell of the grid, in a square otherwise.
    """
    frames = [video[index].convert("RGB") for index in evenly(len(video), SHEET_FRAMES)]
    width, height = frames[0].size
    gap = max(1, width // 16)
    fits = len(frames) * (width + gap) <= MAX_CELL
    columns = len(frames) if fits else math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, PAPER)
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        sheet.paste(frame, (column * (width + gap), row * (height + gap)))
    return sheet


def save_animation(
    videos: Sequence[Sequence[Image.Image]],
    draw: Callable[[int], Image.Image],
    path: Path,
) -> None:
    """Write a GIF that loops; of long videos at most 24 evenly chosen frames.

    Args:
        videos: what is shown; the longest decides how many frames there are.
        draw: the picture of a frame's number.
        path: the file.
    """
    longest = max(len(video) for video in videos)
    pages = [draw(index) for index in evenly(longest, ANIMATED_FRAMES)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=FRAME_MS, loop=0)


def evenly(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of the numbers 0 ... count - 1, the first and the last among them.

    >>> evenly(81, 5)
    [0, 20, 40, 60, 80]
    """
    if count <= limit:
        return list(range(count))
    return [round(number * (count - 1) / (limit - 1)) for number in range(limit)]
