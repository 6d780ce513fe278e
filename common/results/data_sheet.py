"""data.png: some of the drawn training images with their ground truth, as stage 1 read it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.cache import Cache
from common.results.own_images import palette
from common.results.pictures import MASK_COLOUR, PANEL, overlay, save_picture

SHOWN, COLUMNS, GAP, LINE = 8, 4, 4, 18  # images, images a row, pixels between, pixels of a line


def draw_data(cache: Cache, path: Path) -> None:
    """Writes a sheet of the first drawn training images, as PNG.

    Foreground is tinted and outlined, on the squashed pictures. With several texts each has the
    colour that VOC gives its index, and the image's texts stand above it in their colours.
    """
    rows = list(dict.fromkeys(cache.samples("train")[:, 0].tolist()))[:SHOWN]
    panels = [_panel(cache, row) for row in rows]
    width, height = (size + GAP for size in panels[0].size)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width - GAP, lines * height - GAP), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * width, index // columns * height))
    save_picture(sheet, path)


def _panel(cache: Cache, row: int) -> Image.Image:
    """One image under its name."""
    several = len(cache.texts) > 1
    colours = np.array(palette()).reshape(-1, 3)
    head = LINE * (1 + several)
    panel = Image.new("RGB", (PANEL, head + PANEL), "white")
    draw, picture, left = ImageDraw.Draw(panel), cache.picture((row, 0)), 4
    draw.text((left, 3), cache.name((row, 0)), fill="black")
    for text, name in enumerate(cache.texts):
        truth = cache.label_map((row, text)) == 1
        if not truth.any():
            continue
        colour = tuple(colours[text + 1].tolist()) if several else MASK_COLOUR
        picture = np.asarray(overlay(picture, truth, colour=colour))
        if several:
            draw.text((left, LINE + 3), name, fill=colour)
            left += draw.textlength(name) + 8
    panel.paste(Image.fromarray(picture), (0, head))
    return panel
