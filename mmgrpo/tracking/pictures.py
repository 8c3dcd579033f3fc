"""Many images as one: a grid with captions, and two pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 96
MAX_CELL = 320
GAP = 6
LINE = 13
PAPER, INK, FAINT = "white", "black", "#777777"


@dataclass(frozen=True)
class Cell:
    """An image of the grid with the lines below it."""

    image: Image.Image
    caption: Sequence[str] = ()


def draw_grid(rows: Sequence[Sequence[Cell]], titles: Sequence[str] | None = None) -> Image.Image:
    """Draw rows of images, each row under its title.

    Small images are enlarged by a whole factor without smoothing, large ones are scaled down.

    Args:
        rows: cells, row by row; rows may have different lengths.
        titles: one per row.
    """
    cells = [cell for row in rows for cell in row]
    shown = {id(cell): scale_to_cell(cell.image) for cell in cells}
    width = max(image.width for image in shown.values())
    height = max(image.height for image in shown.values())
    text = LINE * max(len(cell.caption) for cell in cells)
    head = LINE + 4 if titles else 0
    step_x, step_y = width + GAP, head + height + text + GAP
    paper = Image.new("RGB", (GAP + step_x * max(map(len, rows)), GAP + step_y * len(rows)), PAPER)
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(size=10)
    for number, row in enumerate(rows):
        top = GAP + step_y * number
        if titles:
            draw.text((GAP, top), _fit(titles[number], paper.width - 2 * GAP, font), INK, font)
        for column, cell in enumerate(row):
            left = GAP + step_x * column
            paper.paste(shown[id(cell)], (left, top + head))
            for line, caption in enumerate(cell.caption):
                y = top + head + height + LINE * line + 1
                draw.text((left, y), _fit(caption, width, font), FAINT, font)
    return paper


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Draw two pictures beside each other, each under its title."""
    gap = 4 * GAP
    paper = Image.new(
        "RGB", (left.width + right.width + gap, max(left.height, right.height) + 2 * LINE), PAPER
    )
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(size=12)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.width + gap)):
        draw.text((x + GAP, 4), title, INK, font)
        paper.paste(picture, (x, 2 * LINE))
    return paper


def scale_to_cell(image: Image.Image) -> Image.Image:
    """Return an RGB image whose longer side is between 96 and 320 pixels where that is possible."""
    image = image.convert("RGB")
    longer = max(image.size)
    if longer < MIN_CELL:
        factor = -(-MIN_CELL // longer)
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    if longer > MAX_CELL:
        size = (
            max(1, round(image.width * MAX_CELL / longer)),
            max(1, round(image.height * MAX_CELL / longer)),
        )
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def _fit(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Cut a line to the width; characters that the built-in font lacks are drawn as boxes."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[: -max(1, len(text) // 20)]
    return text
