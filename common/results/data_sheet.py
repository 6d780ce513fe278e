"""What stage 1 shows of the data as it read them: data.png, and a line beside the paper's."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.cache import Cache
from common.results.own_images import palette
from common.results.paper import paper_row
from common.results.pictures import MASK_COLOUR, PANEL, overlay, save_picture

MOST = 0.60  # a foreground rate above which masks of one's own may be inverted
FAR = 0.10  # a difference of foreground rates that no like test set has
SHOWN, COLUMNS, GAP, LINE = 8, 4, 4, 18  # images, images a row, pixels between, pixels of a line


def draw_data(cache: Cache, path: Path) -> None:
    """Writes a sheet of drawn training images and of test images spread over the set, as PNG.

    Foreground is tinted and outlined, on the squashed pictures. With several texts each has the
    colour that VOC gives its index, and the image's texts stand above it in their colours.
    """
    drawn, tested = (list(dict.fromkeys(cache.samples(split)[:, 0].tolist()))
                     for split in ("train", "test"))
    spread = np.linspace(0, len(tested) - 1, min(len(tested), SHOWN // 2)).astype(int)
    rows = drawn[:SHOWN // 2] + [tested[index] for index in spread]
    panels = [_panel(cache, row) for row in rows]
    width, height = (size + GAP for size in panels[0].size)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width - GAP, lines * height - GAP), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * width, index // columns * height))
    save_picture(sheet, path)


def foreground_line(cache: Cache, paper: str | None) -> str:
    """How much foreground the test samples have under their patch centres, beside the paper's.

    That is what patches chosen at random hit, so the paper's figure is that of its random agent.
    paper: the task's key in the paper's tables, None if it has none.
    """
    rate = (cache.truth_centres(cache.samples("test")) == 1).float().mean().item()
    line = f"foreground under the patch centres of the test images: {rate:.1%}"
    if paper is None:
        most = ". WARNING: that is most of them; if white should be background, invert the masks"
        return line + (most if rate > MOST else "")
    expected = paper_row(paper)["w/o RL"]["FR"] / 100
    line += f" (the paper's random patches: {expected:.1%})"
    if abs(rate - expected) > FAR:
        line += (". WARNING: they are so far apart that the split, the folder or what white means "
                 "in the masks must be another: look at data.png")
    return line


def _panel(cache: Cache, row: int) -> Image.Image:
    """One image under its name."""
    several = len(cache.texts) > 1
    colours = np.array(palette()).reshape(-1, 3)
    head = LINE * (1 + several)
    panel = Image.new("RGB", (PANEL, head + PANEL), "white")
    draw, picture, left = ImageDraw.Draw(panel), cache.picture((row, 0)), 4
    draw.text((left, 3), cache.place(row), fill="black")
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
