"""Pictures: training curves, and strips of masks side by side."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from common.results.plotting import plt, save_figure
from common.runtime.files import PNG_MARK, write_atomic

PANEL = 256  # pixels a side of one picture in a strip
MASK_COLOUR, MASK_SHARE = (30, 120, 255), 0.5  # blue: points are green and red
FOREGROUND, BACKGROUND = (40, 220, 60), (240, 40, 40)


def plot_curves(rows: list[dict], path: Path, title: str) -> None:
    """One small plot per logged quantity over the log's first column, as PNG.

    Writes nothing where the log is empty.
    """
    if not rows:
        return
    x_name, *names = rows[0]
    columns = 3
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.4 * lines), squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes.flat, names):
        axis.plot([row[x_name] for row in rows], [row[name] for row in rows], linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel(x_name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def overlay(picture: np.ndarray, mask: np.ndarray, size: tuple[int, int] = (PANEL, PANEL),
            colour: tuple[int, int, int] = MASK_COLOUR) -> Image.Image:
    """A picture with a mask laid over it in a colour, with a white outline.

    picture: uint8 (H, W, 3). mask: bool (H', W'). size: (width, height) of what is returned.
    """
    base = Image.fromarray(picture).resize(size, Image.BILINEAR)
    where = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.NEAREST)
    outline = ImageChops.subtract(where.filter(ImageFilter.MaxFilter(3)), where)
    share = where.point(lambda value: value * MASK_SHARE)
    base = Image.composite(Image.new("RGB", base.size, colour), base, share)
    return Image.composite(Image.new("RGB", base.size, (255, 255, 255)), base, outline)


def draw_points(panel: Image.Image, points: np.ndarray, labels: np.ndarray, frame: int) -> None:
    """Marks points on `panel`: green where the label is 1, red where it is 0.

    points: (n, 2), (x, y) in the square `frame` that the image was squashed to. labels: (n,).
    """
    draw, radius = ImageDraw.Draw(panel), max(2, min(panel.size) // 50)
    for (x, y), label in zip(points * (np.array(panel.size) / frame), labels):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=FOREGROUND if label else BACKGROUND, outline=(255, 255, 255))


def strip(name: str, target: str, picture: np.ndarray, truth: np.ndarray,
          masks: dict[str, np.ndarray], prompts: dict[str, tuple[np.ndarray, np.ndarray]],
          frame: int) -> Image.Image:
    """One row: image, ground truth, then each of the masks under its caption.

    Masks lie on a grey copy of the image, so that nothing but masks and points has a colour.

    name, target: the image's name and the text that is asked for, captions of the first two panels.
    picture: uint8 (H, W, 3). truth: uint8 (H, W), 1 foreground. masks: {caption: bool (H, W)}.
    prompts: {caption: (points (n, 2), labels (n,))}, to be marked on that mask, as in
    `draw_points`.
    """
    grey = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    panels = [(name, overlay(picture, np.zeros((1, 1), bool))),
              (f"ground truth: {target}", overlay(grey, truth == 1))]
    for caption, mask in masks.items():
        panels.append((caption, overlay(grey, mask)))
        if caption in prompts:
            draw_points(panels[-1][1], *prompts[caption], frame)
    row = Image.new("RGB", ((PANEL + 4) * len(panels) - 4, PANEL + 18), (255, 255, 255))
    for index, (caption, panel) in enumerate(panels):
        row.paste(panel, (index * (PANEL + 4), 18))
        ImageDraw.Draw(row).text((index * (PANEL + 4) + 4, 3), caption, fill=(0, 0, 0))
    return row


def save_strips(strips: list[Image.Image], path: Path) -> None:
    """The strips one under the other, as PNG."""
    height = sum(one.height + 6 for one in strips)
    sheet = Image.new("RGB", (strips[0].width, height), (255, 255, 255))
    top = 0
    for one in strips:
        sheet.paste(one, (0, top))
        top += one.height + 6
    save_picture(sheet, path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """As a marked PNG, which a later call may replace."""
    mark = PngInfo()
    mark.add_text(*PNG_MARK)
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG", pnginfo=mark))
