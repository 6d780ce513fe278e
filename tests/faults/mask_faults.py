"""Masks as tools export them, drawn at random, with the truth that they mean.

Each mask must be read as it is meant, up to its edges where it has soft or noisy ones, or be
refused with a UserError that names it. A mask of a plain kind must be read.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, PngImagePlugin
from scipy import ndimage

from common.images import Sample
from common.label_maps import read_mask
from common.runtime.errors import UserError
from common.tasks import get_task, with_foreground
from tests.faults.stage_faults import Found

# VOC's first colours, as labelme and others write them
VOC = np.zeros((256, 3), np.uint8)
VOC[1:6] = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
VOC[255] = (224, 224, 192)
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 0, 0), (0, 0, 128), (255, 255, 0),
           (30, 144, 255), (220, 20, 60), (90, 40, 10))


class Scene(NamedTuple):
    """What is on a picture; all arrays are (H, W)."""

    target: np.ndarray  # bool
    soft: np.ndarray  # uint8, the target with anti-aliased edges, 255 inside
    classes: np.ndarray  # uint8: 0 background, 1 the target, 2 and 3 other objects
    ring: np.ndarray  # bool, pixels around the target without a truth


class Export(NamedTuple):
    """A mask as it is saved."""

    picture: Image.Image
    truth: np.ndarray | None  # uint8 label map that it means; None if nothing can be read from it
    suffix: str = ".png"
    options: dict = {}  # of Pillow's save()
    foreground: str = ""  # the constant FOREGROUND
    edge: int = 0  # pixels on either side of an edge that may be read either way


Kind = Callable[[random.Random, Scene], Export]


def draw_scene(rng: random.Random) -> Scene:
    """Large and tiny targets, in one part or several, and sometimes none or nothing else."""
    height, width = rng.randrange(24, 120), rng.randrange(24, 120)
    what = rng.random()
    if what < 0.06:
        target = np.full((height, width), what < 0.03)
        return Scene(target, np.uint8(255) * target, target.astype(np.uint8), ~target & False)
    big = Image.new("L", (4 * width, 4 * height))
    for _ in range(rng.choice((1, 1, 1, 3))):
        size = rng.choice((6, 12, 20, 40))
        x, y = rng.randrange(width - 5), rng.randrange(height - 5)
        box = [4 * x, 4 * y, 4 * (x + size), 4 * (y + rng.randrange(5, size))]
        draw = ImageDraw.Draw(big)
        rng.choice((draw.ellipse, draw.rectangle))(box, fill=255)
    soft = np.asarray(big.resize((width, height), Image.Resampling.BOX))
    target = soft > 127
    # the two other objects lie in the half of the picture that holds less of the target
    classes = target.astype(np.uint8)
    others = ~ndimage.binary_dilation(target, iterations=5)
    half = np.arange(width) < width // 2
    half = half if target[:, half].sum() < target.sum() / 2 else ~half
    classes[others & half & (np.arange(height)[:, None] < height // 2)] = 2
    classes[others & half & (np.arange(height)[:, None] >= height // 2)] = 3
    ring = ndimage.binary_dilation(target, iterations=2) & ~target
    return Scene(target, soft, classes, ring)


def paletted(numbers: np.ndarray, palette: np.ndarray) -> Image.Image:
    picture = Image.fromarray(numbers.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    return picture


def ringed(numbers: np.ndarray, scene: Scene) -> np.ndarray:
    return np.where(scene.ring, 255, numbers).astype(np.uint8)


def coloured(rng: random.Random, share: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): so much of one colour; share (H, W) is 0 to 255."""
    return (share[..., None] / 255 * rng.choice(COLOURS)).round().astype(np.uint8)


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8))


# ---- plain kinds, which must be read -------------------------------------------------------------


def white(rng: random.Random, scene: Scene) -> Export:
    """White on black in every mode and format."""
    grey = Image.fromarray(np.uint8(255) * scene.target)
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (45455).to_bytes(4))
    deep = Image.fromarray(np.uint16(65535) * scene.target)
    picture, suffix, options = rng.choice([
        (grey, ".png", {}), (grey.convert("1"), ".png", {}), (grey.convert("RGB"), ".png", {}),
        (grey.convert("RGBA"), ".png", {}), (grey.convert("LA"), ".png", {}), (deep, ".png", {}),
        (grey.convert("P"), ".png", {}), (grey, ".png", {"pnginfo": gamma}), (grey, ".gif", {}),
        (grey, ".bmp", {}), (grey.convert("1"), ".bmp", {}), (grey.convert("P"), ".bmp", {}),
        (grey, ".tif", {}), (deep, ".tif", {}), (grey.convert("CMYK"), ".tif", {}),
        (grey.convert("RGB"), ".tif", {"compression": "tiff_lzw"}),
        (grey.convert("1"), ".tif", {"compression": "group4"}),
        (grey, ".webp", {"lossless": True}), (grey.convert("RGBA"), ".webp", {"lossless": True})])
    return Export(picture, scene.target.astype(np.uint8), suffix, options)


def ones(rng: random.Random, scene: Scene) -> Export:
    """0 and 1, with 255 to ignore or without, as levels or as palette indices."""
    numbers = scene.target.astype(np.uint8)
    if rng.random() < 0.5 and scene.target.any():
        numbers = ringed(numbers, scene)
    if rng.random() < 0.5:
        return Export(paletted(numbers, VOC), numbers, rng.choice((".png", ".bmp", ".tif")))
    wide = rng.random() < 0.3
    return Export(Image.fromarray(numbers.astype(np.uint16) if wide else numbers), numbers)


def soft_edges(rng: random.Random, scene: Scene) -> Export:
    """Anti-aliased, blurred or resized."""
    soft, truth, edge = Image.fromarray(scene.soft), scene.target, 0
    cores = ndimage.binary_erosion(truth, iterations=4, border_value=1)
    if rng.random() < 0.5 and (ndimage.binary_propagation(cores, mask=truth) == truth).all():
        soft, edge = soft.filter(ImageFilter.GaussianBlur(rng.choice((1, 2)))), 2
    mode = rng.choice(("L", "RGB", "RGBA", "LA"))
    return Export(soft.convert(mode), truth.astype(np.uint8), edge=edge)


def lossy(rng: random.Random, scene: Scene) -> Export:
    """JPEG and WebP, and PNGs that were a JPEG before."""
    source = Image.fromarray(scene.soft if rng.random() < 0.5 else np.uint8(255) * scene.target)
    source = source.convert(rng.choice(("L", "RGB")))
    suffix, options = rng.choice([
        (".jpg", {"quality": rng.randrange(60, 101)}),
        (".webp", {"quality": rng.randrange(70, 99)}),
        (".tif", {"compression": "jpeg", "quality": 90})])
    return Export(source, scene.target.astype(np.uint8), suffix, options, edge=2)


def one_colour(rng: random.Random, scene: Scene) -> Export:
    """One colour on black, sharp or soft, and on transparent black."""
    share = scene.soft if rng.random() < 0.3 else np.uint8(255) * scene.target
    colours = coloured(rng, share)
    truth = scene.target.astype(np.uint8)
    if not scene.target.any() or scene.target.all():
        colours = colours * (not scene.target.all())
        truth = truth * 0
    alpha = np.full_like(truth, 255)
    if rng.random() < 0.3 and set(np.unique(share)) <= {0, 255}:
        alpha = 255 * truth if truth.any() else alpha
    return Export(with_alpha(colours, alpha) if rng.random() < 0.5 or not alpha.all()
                  else Image.fromarray(colours), truth)


def asked_number(rng: random.Random, scene: Scene) -> Export:
    """A class number as FOREGROUND, or any."""
    numbers = np.array([0, 3, 7, 1], np.uint8)[scene.classes]
    wide = rng.random() < 0.2
    if rng.random() < 0.5 and scene.target.any() and not wide:
        numbers = ringed(numbers, scene)
    asked = rng.choice(("3", "any"))
    truth = (numbers == 3 if asked == "3" else numbers > 0).astype(np.uint8)
    if len(np.setdiff1d(numbers, [0, 255])):
        truth[numbers == 255] = 255
    if wide:
        picture = Image.fromarray(np.where(numbers == 1, 300, numbers).astype(np.uint16))
    else:
        picture = rng.choice((Image.fromarray(numbers), paletted(numbers, VOC)))
    return Export(picture, truth, foreground=asked)


def asked_colour(rng: random.Random, scene: Scene) -> Export:
    """A colour as FOREGROUND, or any."""
    chosen = rng.sample(COLOURS, 3)
    colours = np.array([(0, 0, 0), *chosen], np.uint8)[scene.classes]
    asked = rng.choice((f"#{bytes(chosen[0]).hex()}", "any"))
    truth = scene.target if asked != "any" else scene.classes > 0
    picture = Image.fromarray(colours)
    mode = rng.choice(("RGB", "RGBA", "P"))
    if mode == "P":
        palette = np.zeros((256, 3), np.uint8)
        palette[1:4] = chosen
        picture = paletted(scene.classes, palette)
    if mode == "RGBA":  # of the other objects, one is erased
        picture = with_alpha(colours, 255 * (scene.classes != 2))
        truth = truth & (scene.classes != 2)
    return Export(picture, truth.astype(np.uint8), foreground=asked)


# ---- other kinds, which may be refused -----------------------------------------------------------


def class_numbers(rng: random.Random, scene: Scene) -> Export:
    """Several classes without FOREGROUND."""
    table = rng.choice(([0, 2, 0, 0], [0, 15, 0, 0], [0, 1, 2, 3], [0, 2, 9, 20], [0, 85, 170, 255],
                        [0, 100, 255, 0], [0, 120, 240, 0]))
    numbers = np.array(table, np.uint8)[scene.classes]
    if rng.random() < 0.4:
        numbers = ringed(numbers, scene)
    picture = rng.choice((Image.fromarray(numbers), paletted(numbers, VOC),
                          Image.fromarray(numbers).convert("RGB")))
    suffix = rng.choice((".png", ".png", ".jpg", ".tif"))
    if suffix == ".jpg" and ((numbers > 40) & (numbers < 215)).sum() < 200:
        suffix = ".png"  # in a JPEG, few or dark ones look like noise
    if set(np.unique(numbers)) <= {0, 1, 255}:  # which is no fault
        return white(rng, scene)
    if suffix == ".jpg":
        return Export(Image.fromarray(numbers), None, suffix, {"quality": 90})
    return Export(picture, None, suffix)


def class_colours(rng: random.Random, scene: Scene) -> Export:
    """Instances in colours of their own, or panoptic numbers in three channels."""
    if not (scene.classes == 2).any() or not scene.target.any():
        return white(rng, scene)
    if rng.random() < 0.3:
        code = np.array([0, 1, 300, 66000])[scene.classes]
        colours = np.stack([code % 256, code // 256 % 256, code // 65536], 2).astype(np.uint8)
    else:
        colours = np.array([(0, 0, 0), *rng.sample(COLOURS, 3)], np.uint8)[scene.classes]
    picture = Image.fromarray(colours)
    return Export(picture.convert(rng.choice(("RGB", "RGBA", "P"))), None, rng.choice(
        (".png", ".tif", ".bmp")) if picture.mode == "RGB" else ".png")


def dark_on_colour(rng: random.Random, scene: Scene) -> Export:
    """A target that is darker than the coloured background."""
    if not scene.target.any():
        return white(rng, scene)
    back, front = rng.choice((((255, 255, 0), (0, 0, 160)), ((255, 255, 255), (255, 0, 0)),
                              ((128, 128, 128), (64, 0, 0)), ((200, 200, 200), (90, 90, 90))))
    colours = np.where(scene.target[..., None], front, back).astype(np.uint8)
    truth = None if scene.target.all() else scene.target.astype(np.uint8)
    return Export(Image.fromarray(colours), truth, rng.choice((".png", ".jpg", ".bmp")))


def alpha_shape(rng: random.Random, scene: Scene) -> Export:
    """The shape is in the transparency alone, or upside down in it."""
    if not scene.target.any() or scene.target.all():
        return white(rng, scene)
    shape = np.uint8(255) * scene.target
    colours, alpha = rng.choice([
        (np.full((*shape.shape, 3), 255, np.uint8), shape),  # white everywhere
        (np.zeros((*shape.shape, 3), np.uint8), shape),  # black everywhere
        (np.full((*shape.shape, 3), 255, np.uint8), 255 - shape)])  # a hole in white
    return Export(with_alpha(colours, alpha), scene.target.astype(np.uint8))


def inverted(rng: random.Random, scene: Scene) -> Export:
    """ImageJ's inverted look-up tables: 255 is the target, and is shown black."""
    numbers = np.uint8(255) * scene.target
    if rng.random() < 0.5:
        return Export(paletted(numbers, np.repeat(np.arange(255, -1, -1, np.uint8), 3)),
                      scene.target.astype(np.uint8))
    # Pillow inverts 8 bits when it writes such a TIFF, and when it reads it, but not 16
    stored = ~numbers if rng.random() < 0.5 else ~numbers.astype(np.uint16)
    return Export(Image.fromarray(stored), scene.target.astype(np.uint8), ".tif",
                  {"tiffinfo": {262: 0}})


def dark_lossy(rng: random.Random, scene: Scene) -> Export:
    """A JPEG or WebP whose target is not white, or of colours."""
    suffix, options = rng.choice(((".jpg", {"quality": 90}), (".webp", {"quality": 90})))
    if rng.random() < 0.5:
        large = suffix == ".jpg" and scene.target.sum() > 200
        faint = (1, 3) if large else ()  # otherwise they would be lost without a trace
        levels = scene.target * np.uint8(rng.choice((*faint, 30, 100, 128, 150, 190)))
        truth = scene.target.astype(np.uint8)
        return Export(Image.fromarray(levels.astype(np.uint8)), truth, suffix, options, edge=2)
    picture = Image.fromarray(coloured(rng, np.uint8(255) * scene.target))
    truth = None if scene.target.all() else scene.target.astype(np.uint8)
    return Export(picture, truth, suffix, options, edge=2)


def no_mask(rng: random.Random, scene: Scene) -> Export:
    """A photograph, a trimap, several pages, 16 bits of colour in the lower byte."""
    shape = scene.target.shape
    what = rng.randrange(4)
    if what == 0:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 1, shape)
        noise = ndimage.gaussian_filter(noise, 2)
        photo = np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)
        return Export(Image.fromarray(photo), None, rng.choice((".png", ".jpg", ".webp")))
    if what == 1:
        trimap = np.uint8(255) * scene.target
        wide = ndimage.binary_dilation(scene.target, iterations=6) & ~scene.target
        trimap[wide] = 128
        return Export(Image.fromarray(trimap), None if wide.any() else
                      scene.target.astype(np.uint8))
    mask = Image.fromarray(np.uint8(255) * scene.target)
    if what == 2:
        pages = {"save_all": True, "append_images": [Image.fromarray(~np.asarray(mask))]}
        return Export(mask, None, rng.choice((".tif", ".gif", ".webp")), pages)
    return Export(mask.convert("RGB"), None, ".jpg", {"quality": 90}, rng.choice(("1", "any")))


PLAIN: tuple[Kind, ...] = (white, ones, soft_edges, lossy, one_colour, asked_number, asked_colour)
OTHER: tuple[Kind, ...] = (class_numbers, class_colours, dark_on_colour, alpha_shape, inverted,
                           dark_lossy, no_mask)


def misread(label_map: np.ndarray, export: Export) -> str | None:
    """What is wrong with the label map of an export; None if it is what is meant."""
    truth = export.truth
    if truth is None:
        return "it is read, though it does not say what is meant"
    wrong = label_map != truth
    if export.edge:
        inside = ndimage.binary_erosion(truth == 1, iterations=export.edge, border_value=1)
        near = ndimage.binary_dilation(truth == 1, iterations=export.edge) & ~inside
        if (label_map == 1).any() != (truth == 1).any() or wrong.sum() > (truth == 1).sum() / 2:
            return f"{wrong.sum()} pixels are wrong, and {(truth == 1).sum()} are meant"
        wrong &= ~near
    return f"{wrong.sum()} pixels are wrong" if wrong.any() else None


def masks(folder: Path, count: int, seed: int, only: str) -> Found:
    """`count` masks, half of them of plain kinds."""
    found = Found()
    kinds = [kind for pair in zip(PLAIN, OTHER) for kind in pair]
    for number in range(count):
        case, kind = f"mask-{number}", kinds[number % len(kinds)]
        if only not in ("", case):
            continue
        rng = random.Random(f"{seed} {case}")
        export = kind(rng, draw_scene(rng))
        path = folder / f"{case}{export.suffix}"
        export.picture.save(path, **export.options)
        task = with_foreground(get_task("folder", "thing"), export.foreground)
        size = (export.picture.height, export.picture.width)
        what, told = kind.__name__.replace("_", " "), f"{path.name}, {export.options}"
        try:
            label_map, how = read_mask(Sample(case, path, path, "test"), task, size)
        except UserError as error:
            found.count(f"{what}: refused")
            found.check(str(path) in str(error), case, f"{told}: {error}")
            found.check(kind not in PLAIN, case, f"{told}: a {what} is refused: {error}")
            continue
        found.count(f"{what}: read")
        wrong = misread(label_map, export)
        found.check(wrong is None, case, f"{told}: {what}, {how}: {wrong}")
    return found
